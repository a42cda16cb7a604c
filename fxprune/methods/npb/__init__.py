"""NPB: in each layer, balance nodes in use against incoming paths, by an exact programme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.channels.orientation import swap_orientation
from fxprune.graph.ir import KernelSet
from fxprune.methods.npb.assignment import solve
from fxprune.methods.npb.layer_by_layer import decide
from fxprune.paths.count import flow, reach
from fxprune.scoring.contract import Method, Problem, Scores, fixed_magnitudes
from fxprune.scoring.layerwise import is_untouched, layer_budgets, select_by_layer
from fxprune.sparsity.masks import Masks

CHOSEN = 4.0
"""The score of chosen weights; that of others on a path is 1 to 3, that of the rest below 1."""


def npb(
    *,
    alpha: float = 0.99,
    beta: float = 0.001,
    max_per_kernel: int = 5,
    min_per_node: int = 1,
    inside: Literal["random", "magnitude"] = "random",
    repair: bool = True,
    resolution: Literal["spatial", "channel"] = "spatial",
) -> Method:
    """Node-path balancing (Pham, Ta, Liu, Xiang, Le, Wen, Tran-Thanh 2023, NeurIPS).

    Layers are pruned in the order of execution. For each, the number of weights in every kernel maximises
    alpha * (nodes in use) + (1 - alpha) * (paths coming in) + beta * (kernels in use), each relative to its
    maximum, under the layer's budget: ERK, unless ``budget`` fixes layers. Paths coming in are counted
    exactly, under the masks chosen before, also behind residual sums, concatenations and attention. The
    optimum is found by a sort, not by a solver: see ``fxprune.methods.npb.assignment`` for the proof. Needs
    neither data nor weights.

    Options:
        alpha: from 0 (paths only) to 1 (nodes only)
        beta: weight of the kernels in use, 0 or more
        max_per_kernel: most weights of a kernel; raised where a layer's budget needs more; free in the first
        min_per_node: weights that a node has to have to count in full
        inside: which weights of a kernel: "random" ones or those of the largest "magnitude"
        repair: at the end, put weights that lie on no path into kernels that lie on one
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster

    Deviations from the authors' code: P_max is the true optimum where a budget is smaller than one input's
    share; inputs that no path reaches count for nothing (there, a repair step moves their weights later); no
    layer is cut into chunks; no schedule of ``max_per_kernel`` over depth; weights repaired stay in their
    layer, so that every layer keeps exactly its budget. Where weights were pruned before, what the optimum
    would put on them goes to inputs with many paths.

    Cost: one count of paths and one sort per layer.
    When: with neither data nor weights, at extreme sparsities, where many channels should stay in use.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"method 'npb': alpha={alpha!r}, expected a number from 0 to 1")
    if beta < 0:
        raise ValueError(f"method 'npb': beta={beta!r}, expected a number of at least 0")
    for option, value in (("max_per_kernel", max_per_kernel), ("min_per_node", min_per_node)):
        if value < 1:
            raise ValueError(f"method 'npb': {option}={value!r}, expected an integer of at least 1")

    options = _Options(alpha, beta, max_per_kernel, min_per_node, inside, repair, resolution)
    return Method(
        name="npb",
        find=lambda problem: _find(problem, options),
        needs=frozenset({"graph"}),
        summary="balances nodes and paths in every layer, by an exact programme; no data",
        paper="Pham et al. 2023, NeurIPS (Towards data-agnostic pruning at initialization)",
        scored=False,
        shards="shapes" if inside == "random" else "no",
    )


@dataclass(frozen=True)
class _Options:
    """The options of :func:`npb`: ``cap`` is ``max_per_kernel``, ``least`` is ``min_per_node``."""

    alpha: float
    beta: float
    cap: int
    least: int
    inside: str
    repair: bool
    resolution: Literal["spatial", "channel"]


def _find(problem: Problem, options: _Options) -> Masks:
    if is_untouched(problem):
        return dict(problem.masks)
    layers = layer_budgets(problem)
    scores: Scores = {}
    done = iter(problem.progress(range(len(layers)), "npb", len(layers)))

    def choose(name: str, incoming: Tensor) -> Tensor:
        next(done, None)
        kernels, weight = problem.graph.kernels[name], problem.weights[name]
        order = weight.abs() if options.inside == "magnitude" else _noise(problem, weight)
        within = problem.masks[name].cpu()
        cap = options.cap if scores else weight[0, 0].numel()
        counts = _counts(kernels, incoming, layers[name], cap, options, problem.generator)
        scores[name] = _scores(counts, incoming, order.cpu(), within & kernels.live_taps)
        return _select(scores[name], layers[name], within)

    fixed = {name: size.cpu() for name, size in fixed_magnitudes(problem, torch.float64).items()}
    chosen = decide(problem.graph, choose, known=fixed, resolution=options.resolution)
    for name, weight in problem.weights.items():
        if name not in chosen:  # no path ever reaches it
            scores[name] = _noise(problem, weight).double()
            chosen[name] = _select(scores[name], layers[name], problem.masks[name].cpu())
    if options.repair:
        scores = _repaired(
            problem, scores, {name: chosen[name] for name in problem.weights}, options.resolution
        )
    scores = {name: scores[name].to(problem.masks[name].device) for name in problem.weights}
    return select_by_layer(problem, scores, layers, "npb")


def _noise(problem: Problem, weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=problem.generator)


def _outputs_first(x: Tensor, kernels: KernelSet) -> Tensor:
    """Turn a parameter of a transposed convolution to (out, in / groups, *taps), or back; no other one."""
    return swap_orientation(x, kernels.groups) if kernels.transposed else x


def _counts(
    kernels: KernelSet, incoming: Tensor, budget: int, cap: int, options: _Options, generator: torch.Generator
) -> Tensor:
    """Solve the programme of one layer: the number of weights of each kernel, shaped as the parameter's first
    two axes.
    """
    paths = _outputs_first(incoming, kernels).flatten(2).amax(2) if incoming.dim() > 2 else incoming
    outputs = paths.shape[0] // kernels.groups
    paths = paths.reshape(kernels.groups, outputs, -1).amax(1)
    taps = max(1, int(kernels.live_taps.sum()))
    needed = -(-budget // max(1, int((paths > 0).sum()) * outputs))
    solved = solve(
        paths.cpu(),
        outputs,
        budget,
        alpha=options.alpha,
        beta=options.beta,
        cap=min(taps, max(cap, needed)),
        least=options.least,
        generator=generator,
    )
    return _outputs_first(solved.transpose(1, 2).flatten(0, 1), kernels)


def _scores(counts: Tensor, incoming: Tensor, order: Tensor, usable: Tensor) -> Tensor:
    """Choose the first ``counts`` usable weights of every kernel in ``order``; score others by paths."""
    ranked = (
        order.where(usable, -1.0).flatten(2) if order.dim() > 2 else order.where(usable, -1.0).unsqueeze(2)
    )
    order_of = ranked.argsort(2, descending=True)
    place = torch.empty_like(order_of).scatter_(
        2, order_of, torch.arange(order_of.shape[2]).expand(order_of.shape)
    )
    is_chosen = (place < counts.unsqueeze(2)).reshape(order.shape) & usable
    spare = (incoming.cpu() + order / (1 + order.max())) / 2 * usable
    return is_chosen * CHOSEN + spare.double()


def _select(scores: Tensor, budget: int, within: Tensor) -> Tensor:
    """Keep the chosen weights, or the ``budget`` highest scores where their number differs."""
    chosen = (scores >= CHOSEN) & within
    if int(chosen.sum()) == budget:
        return chosen
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.where(within, -1.0).flatten().topk(budget).indices] = True
    return mask.view(scores.shape) & within


def _repaired(
    problem: Problem, scores: Scores, chosen: dict[str, Tensor], resolution: Literal["spatial", "channel"]
) -> Scores:
    """Scores that move weights on no path to places on a path: to the fullest kernels in use.

    A weight lies on a path as soon as it is kept if d ln R / d weight is positive. Effective weights stay, so
    that nodes, kernels and paths can only grow.
    """
    known = {name: size.cpu() for name, size in fixed_magnitudes(problem, torch.float64).items()}
    masks = {name: mask.bool() for name, mask in chosen.items()}
    effective = reach(problem.graph, {**known, **masks}, resolution=resolution)
    if all(bool((effective[name] == mask).all()) for name, mask in masks.items()):
        return scores
    edges = {**known, **{name: mask.double() for name, mask in masks.items()}}
    gradients = flow(problem.graph, edges, resolution=resolution, dtype=torch.float64).gradients
    repaired = {}
    for name, mask in masks.items():
        kept = (effective[name] & mask).double()
        filled = kept.flatten(2).mean(2) if kept.dim() > 2 else kept
        filled = filled.view(*filled.shape, *[1] * (kept.dim() - 2)).expand(kept.shape)
        candidates = (gradients[name] > 0) * (1 + filled)
        low = scores[name] / (2 * scores[name].max().clamp(min=1e-30))
        repaired[name] = kept * CHOSEN + candidates * (1 - kept) + low
    return repaired
