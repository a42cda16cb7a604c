"""PX: path exclusion, keeps the weights that carry a bound of the tangent kernel's trace, in many rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from fxprune.graph import ChannelGraph, ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.methods.px.active_paths import EMPTY, Activity, Number, added, at_power
from fxprune.paths.count import flow, reach
from fxprune.scoring.contract import Method, Problem, Scores, prune_in_rounds
from fxprune.scoring.data import Batch
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average, largest
from fxprune.scoring.gradients import count_of, run_at, scoring, twice_differentiable
from fxprune.sparsity.collapse import live_layers, repair
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
    real, masked network in eval mode; ``_activity`` says it for gates, attention and pooling.

    Deviations from the authors' code, which takes norms with batch statistics, and the classifier's signed
    weights as they are: a score is positive where the weight lies on a path to an output that is active on
    the data, and zero elsewhere. At the end, residual branches that have lost their last path get one back
    (the paper's promise, which its scores keep in layers that all paths cross). As long as the classifier
    is dense, all outputs have the same activity, and the order is that of squared weights alone.
    """
    count_of("px", "batches", batches)

    def find(problem: Problem) -> Masks:
        squares = {name: weight.float().square() for name, weight in problem.weights.items()}
        others = {name: weight.float().square() for name, weight in _others(problem).items()}
        weighted = _Weighted(problem.graph)

        def bound(_: Problem, masks: Masks) -> Scores:
            some = read_batches(problem, batches, "px")
            if not _is_even(problem.graph, masks):
                weighted.set(_activities(problem, masks, some))
            alive = {name: square * masks[name] for name, square in squares.items()}
            found = flow(weighted.graph, alive | others, resolution=resolution, pool="mean", products="mean")
            return {name: found.gradients[name] * square for name, square in alive.items()}

        masks = prune_in_rounds(problem, bound, schedule=Exponential(rounds), regrow=False, name="px")
        return masks if problem.invert else _with_every_layer(problem, masks)

    return Method(
        name="px",
        find=find,
        needs=frozenset({"data"}),
        summary="keeps the weights on paths that are active on the data, in many rounds",
        paper="Iurada et al. 2024, arXiv 2406.01820",
    )


def _others(problem: Problem) -> dict[str, torch.Tensor]:
    """Kernels that are not to be pruned, beside the problem's weights on their device."""
    home = next(iter(problem.weights.values())).device
    return {
        name: problem.model.get_parameter(name).detach().to(home)
        for name in problem.graph.kernels
        if name not in problem.weights
    }


def _with_every_layer(problem: Problem, masks: Masks) -> Masks:
    """``masks``, with a path again in layers that lost their last one, if the budget has room for it.

    Layers that all paths cross have the same sum of scores, and cannot lose all of it. Branches between which
    paths choose share that sum; what is pruned in one flows through the others, down to nothing.
    """
    fixed = {name: weight != 0 for name, weight in _others(problem).items()}
    alive = live_layers(reach(problem.graph, masks | fixed))
    if len(alive) == len(problem.graph.kernels):
        return masks
    if live_layers(reach(problem.graph, problem.masks | fixed)) <= alive:
        return masks
    try:
        return repair(
            problem.graph, masks, problem.weights, problem.budget,
            within=problem.masks, fixed=fixed, granularity=problem.granularity,
        )  # fmt: skip
    except RuntimeError:  # so says repair where a path for every layer does not fit
        return masks


def _is_even(graph: ChannelGraph, masks: Masks) -> bool:
    """Whether all outputs surely have the same activity: a dense linear layer makes the only one of them."""
    sinks = [op for op in graph.ops if isinstance(op, ir.Sink)]
    ends = [value.index for sink in sinks for value in sink.inputs]
    last = next((op for op in graph.ops if op.output.index == ends[0]), None) if len(ends) == 1 else None
    if not isinstance(last, ir.Kernel) or last.window is not None or len(last.output.shape) != 2:
        return False
    return last.weight.name not in masks or bool(masks[last.weight.name].all())


def _activities(problem: Problem, masks: Masks, some: list[Batch]) -> list[Number]:
    """For every real output, the squared gains of the active paths that end in it, a mean over processes.

    They are summed over samples, and come in float64, all under one power of two.
    """
    found: list[list[Number]] = []
    with scoring(problem, "eval"), torch.no_grad(), twice_differentiable(), _plain_attention():
        for batch in some:
            found.append(_active_paths(problem, masks, batch))
    totals = [added(numbers, numbers[0].values.shape) for numbers in zip(*found, strict=True)]
    power = largest(max((number.power for number in totals), default=EMPTY), problem.group)
    values = [at_power(number, power) for number in totals]
    average(values, problem.group)
    return [Number(one, power) for one in values]


def _active_paths(problem: Problem, masks: Masks, batch: Batch) -> list[Number]:
    weights = {name: (w * masks[name]).to(problem.device) for name, w in problem.weights.items()}
    activity = Activity({weights[name]: mask.to(problem.device) for name, mask in masks.items()})
    found: list[Number] = []

    def follow(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        activity.start((args, kwargs))

    def collect(model: torch.nn.Module, args: Any, output: Any) -> None:
        real = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        ends = [activity.paths.get(x, Number(torch.zeros_like(x), EMPTY)) for x in real]
        found[:] = [Number(values.double().sum(0), power) for values, power in ends]

    hooks = (
        problem.model.register_forward_pre_hook(follow, with_kwargs=True),
        problem.model.register_forward_hook(collect),
    )
    try:
        with activity:
            run_at(problem, weights, batch, "px")
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused encoder layers of eval mode, whose inside cannot be followed."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _scales(
    _: torch.Tensor, weighted: _Weighted, place: int, shape: tuple[int, ...], image: bool
) -> torch.Tensor:
    """The weight that multiplies the channels of an output with the numbers that are set for it."""
    numbers = weighted.numbers[place]
    return numbers.reshape(shape) if image else numbers.diag()


class _Weighted:
    """A network whose outputs are multiplied by numbers that can be set: one per channel of each output.

    Channels are the last axis, or the second one of images.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.numbers: list[torch.Tensor] = []
        self.axes: list[int] = []
        index = 1 + max((op.output.index for op in graph.ops), default=0)
        ops: list[ir.Op] = []
        for op in graph.ops:
            if not isinstance(op, ir.Sink):
                ops.append(op)
                continue
            outputs = []
            for value in op.inputs:
                scaled = self._scaled(value, index + len(self.axes)) if value.shape[1:] else None
                ops += [scaled] if scaled else []
                outputs.append(scaled.output if scaled else value)
            ops.append(replace(op, inputs=tuple(outputs)))
        self.graph = replace(graph, ops=tuple(ops), programs={})

    def set(self, activities: list[Number]) -> None:
        """Sets the numbers to the sums of ``activities`` (of the outputs' shapes, without the batch).

        Only their ratios matter; all are under one power of two.
        """
        if len(activities) != len(self.axes):
            return  # outputs that are no tensors of the graph: all count alike
        sums = []
        for (activity, _), axis in zip(activities, self.axes, strict=True):
            rest = [dim for dim in range(activity.dim()) if dim != axis]
            sums.append(activity.sum(rest) if rest else activity)
        top = max((float(one.max()) for one in sums), default=0.0)
        for place, one in enumerate(sums):
            self.numbers[place] = one.cpu() / top if top > 0 else torch.ones_like(one.cpu())

    def _scaled(self, value: ir.Value, index: int) -> ir.Kernel:
        place, rank = len(self.axes), len(value.shape)
        image = rank > 3
        channels = value.shape[1 if image else -1]
        self.axes.append(0 if image else rank - 2)
        self.numbers.append(torch.ones(channels))
        spots = rank - 2
        window = ir.Window((1,) * spots, (1,) * spots, ((0, 0),) * spots, (1,) * spots) if image else None
        shape = (channels, 1, *[1] * spots) if image else (channels, channels)
        view = TensorFunction.of(_scales, PREVIOUS, self, place, shape, image)
        return ir.Kernel(
            ir.Value(index, value.shape, value.live),
            (value,),
            "output",
            "output",
            weight=ir.WeightRef(None, shape, view),
            groups=channels if image else 1,
            window=window,
        )
