"""PX: path exclusion, keeps the weights that carry a bound of the tangent kernel's trace, in many rounds."""

from __future__ import annotations

from typing import Literal

from fxprune.graph import ChannelGraph, ir
from fxprune.methods.px.output_activity import output_activities
from fxprune.methods.px.weighted_outputs import WeightedOutputs
from fxprune.paths.count import flow
from fxprune.paths.used import used_layers
from fxprune.scoring.complex_weights import refuse_complex
from fxprune.scoring.contract import Method, Problem, Scores, fixed_magnitudes, prune_in_rounds
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.gradients import count_of
from fxprune.sparsity.collapse import repair
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential


def px(
    *, rounds: int = 100, batches: int = 1, resolution: Literal["spatial", "channel"] = "spatial"
) -> Method:
    """Path eXclusion (Iurada, Ciccone, Tommasi 2024, arXiv 2406.01820).

    Score: ``w^2 * dR/d(w^2)``, with R the sum over outputs k of the product of two path sums that end there:
    of all paths under weights w^2 (an all-ones input), and of those that are active on the data under weights
    1 (squared inputs). Norms and biases are left out of both. Needs data, without labels, best as many of
    each class (``fxprune.data.balanced``).

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        batches: number of batches that are read in every round
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster

    Activity generalises beyond ReLU: an activation s passes its squared gain, (s(z) / z)^2 at the z of the
    real, masked network in eval mode. ``fxprune.methods.px.active_paths`` has the rules for gates, attention
    and pooling.

    Deviations from the authors' code, which takes norms with batch statistics, and the classifier's signed
    weights as they are: a score is positive where the weight lies on a path to an output that is active on
    the data, and zero elsewhere. At the end, residual branches that have lost their last path get one back
    (the paper's promise, which its scores keep in layers that all paths cross). As long as the classifier
    is dense, all outputs have the same activity, and the order is that of squared weights alone.

    Cost: as `synflow`, and a forward pass per batch and round.
    When: at initialization or on pretrained weights, with data but without labels.
    """
    count_of("px", "batches", batches)

    def find(problem: Problem) -> Masks:
        refuse_complex(problem, "px")
        squares = {name: weight.float().square() for name, weight in problem.weights.items()}
        others = {name: size.square() for name, size in fixed_magnitudes(problem).items()}
        weighted = WeightedOutputs(problem.graph)

        def bound(_: Problem, masks: Masks) -> Scores:
            some = read_batches(problem, batches, "px")
            if not _outputs_are_alike(problem.graph, masks):
                weighted.set(output_activities(problem, masks, some))
            alive = {name: square * masks[name] for name, square in squares.items()}
            found = flow(weighted.graph, alive | others, resolution=resolution, pool="mean", products="mean")
            return {name: found.gradients[name] * square for name, square in alive.items()}

        masks = prune_in_rounds(problem, bound, schedule=Exponential(rounds), regrow=False, name="px")
        return masks if problem.invert else _with_every_layer(problem, masks)

    return Method(
        name="px",
        find=find,
        needs=frozenset({"data", "graph"}),
        summary="keeps the weights on paths that are active on the data, in many rounds",
        paper="Iurada et al. 2024, arXiv 2406.01820",
    )


def _with_every_layer(problem: Problem, masks: Masks) -> Masks:
    """Give layers that lost their last path one back, if the budget has room for it.

    Layers that all paths cross have the same sum of scores, and cannot lose all of it. Branches between which
    paths choose share that sum; what is pruned in one flows through the others, down to nothing.
    """
    fixed = {name: size != 0 for name, size in fixed_magnitudes(problem).items()}
    alive = used_layers(problem.graph, masks | fixed)
    if len(alive) == len(problem.graph.kernels):
        return masks
    if used_layers(problem.graph, problem.masks | fixed) <= alive:
        return masks
    try:
        return repair(
            problem.graph, masks, problem.weights, problem.budget,
            within=problem.masks, fixed=fixed, granularity=problem.granularity,
        )  # fmt: skip
    except RuntimeError:  # so says repair where a path for every layer does not fit
        return masks


def _outputs_are_alike(graph: ChannelGraph, masks: Masks) -> bool:
    """Whether all outputs surely have the same activity: there is one, and a dense linear layer makes it."""
    sinks = [op for op in graph.ops if isinstance(op, ir.Sink)]
    ends = [value.index for sink in sinks for value in sink.inputs]
    last = next((op for op in graph.ops if op.output.index == ends[0]), None) if len(ends) == 1 else None
    if not isinstance(last, ir.Kernel) or last.window is not None or len(last.output.shape) != 2:
        return False
    return last.weight.name not in masks or bool(masks[last.weight.name].all())
