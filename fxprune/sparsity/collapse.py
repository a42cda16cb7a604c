"""Find layers that lie on no path any more, and repair masks so that every layer lies on one.

A layer has collapsed when none of its weights lies on a path from input to output, although one would if
nothing were pruned. ``repair`` gives every such layer a path again and spends no more weights than before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from fxprune.graph import ChannelGraph
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import reach
from fxprune.paths.program import Resolution
from fxprune.paths.used import used_layers
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import WEIGHT, Granularity
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import select
from fxprune.sparsity.skeleton import KernelPaths, PathModel, Skeleton, WeightPaths


def live_layers(effective: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the parameters with any weight marked in ``effective``, which is what ``reach`` returns."""
    return {name for name, number in kept(effective).items() if number}


def dead_layers(
    graph: ChannelGraph, living: Collection[str], resolution: Resolution = "spatial"
) -> tuple[str, ...]:
    """List the parameters that are not ``living``, by name, and would be in the dense network."""
    without = graph.kernels.keys() - set(living)
    ever = used_layers(graph, {}, resolution=resolution) if without else set()
    return tuple(name for name in graph.kernels if name in without and name in ever)


def repair(
    graph: ChannelGraph,
    masks: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    budget: Budget,
    *,
    within: Mapping[str, torch.Tensor],
    fixed: Mapping[str, torch.Tensor] | None = None,
    granularity: Granularity = WEIGHT,
) -> Masks:
    """Change masks so that, within the same ``budget``, every layer that can lie on a path does.

    A weight for every layer that lies on no path is tried first, which joins it to what ``masks`` keep. Where
    the rest then cannot spare that many, a small *skeleton* of weights is found, in which every layer lies on
    a path by itself. Both prefer weights that ``masks`` keep, then large ones. The rest of the budget goes to
    what ``masks`` keep: effective weights before those on no path, large before small within a layer.

    Args:
        graph: the network.
        masks: the masks to repair, of the prunable parameters.
        weights: their values.
        budget: how many weights to keep; it is met as exactly as ``granularity`` allows.
        within: only these weights may be kept.
        fixed: masks of parameters that are not to be touched (dense where missing).
        granularity: what is kept or dropped together.

    Raises:
        RuntimeError: the skeleton does not fit the budget or the granularity; the message says how many
            weights it takes.
    """
    open_to = {name: mask & _may_keep(budget, name) for name, mask in within.items()}
    others = dict(fixed or {})
    wanted = used_layers(graph, {**others, **open_to})
    left: set[str] = set()
    for chosen in _plans(graph, masks, weights, open_to, others, [n for n in graph.kernels if n in wanted]):
        _check_fits(chosen, budget)
        together = {name: chosen[name] | mask for name, mask in masks.items()}
        scores = _scores(masks, chosen, reach(graph, {**others, **together}), weights)
        repaired = select(scores, budget, within=open_to, granularity=granularity, method="repair")
        left = wanted - used_layers(graph, {**others, **repaired})
        if not left:
            return repaired
    raise RuntimeError(
        f"on_collapse='repair': {', '.join(sorted(left))} cannot live on {budget.total} weights under "
        f"{granularity}; ask for a lower sparsity"
    )


def _plans(
    graph: ChannelGraph,
    masks: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    within: Masks,
    fixed: Masks,
    wanted: list[str],
) -> Iterator[Masks]:
    """Yield sets of weights to keep before all others, from the cheapest guess to the most thorough search.

    A search looks for paths hundreds of times. So it takes all positions for one first, and ``repair`` checks
    the result with borders. Where the network has a circuit, its kernels stand for weights, which is a
    hundred times faster.
    """
    found = circuit(graph)
    first: PathModel = WeightPaths(graph, "channel") if found is None else KernelPaths(graph, found)
    sizes = _sizes(weights)
    bridges = Skeleton(graph, first, dict(masks), sizes, within, fixed).bridge(wanted)
    if bridges is not None:
        yield bridges
    for paths in (first, WeightPaths(graph, "spatial")):
        yield Skeleton(graph, paths, dict(masks), sizes, within, fixed).build(wanted)


def _scores(
    masks: Mapping[str, torch.Tensor],
    skeleton: Mapping[str, torch.Tensor],
    effective: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Score skeleton weights above kept ones on a path, above other kept ones; and large above small."""
    top = 8.0 * (1 + sum(mask.numel() for mask in masks.values()))  # outweighs all others in any group
    return {
        name: skeleton[name] * top
        + (mask & effective[name]) * 2.0
        + mask * 2.0
        + _relative(weights[name]).double()
        for name, mask in masks.items()
    }


def _may_keep(budget: Budget, name: str) -> bool:
    """Return whether the caller wants anything kept in this parameter."""
    return budget.layers is None or budget.layers[name] > 0


def _check_fits(skeleton: Masks, budget: Budget) -> None:
    need = kept(skeleton)
    if sum(need.values()) > budget.total:
        raise RuntimeError(
            f"on_collapse='repair': to keep every layer on a path takes {sum(need.values())} weights or so, "
            f"{budget.total} are to be kept; ask for a lower sparsity"
        )
    for name, number in (budget.layers or {}).items():
        if need[name] > number:
            raise RuntimeError(
                f"on_collapse='repair': to keep every layer on a path takes {need[name]} weights in "
                f"{name!r}, {number} are to be kept there; give it a lower sparsity"
            )


def _relative(weight: torch.Tensor) -> torch.Tensor:
    """Divide |w| by the largest of its layer: 0 to 1, for any scale of the layer."""
    size = weight.detach().abs().float()
    return size / size.max().clamp(min=torch.finfo(torch.float32).tiny)


def _sizes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (1 + _relative(weight)) / 2 for name, weight in weights.items()}
