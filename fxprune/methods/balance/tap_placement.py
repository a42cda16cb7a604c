"""Choose which weights inside the kernels are kept, given how many of each.

At channel resolution images are periodic, and all taps of a kernel are alike. On a real image central taps
are on more paths than those that reach over a border.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph
from fxprune.paths.count import flow, reach
from fxprune.sparsity.masks import Masks

__all__ = ["connect_kernels", "count_per_kernel", "place_at_random", "take_best_taps"]


def count_per_kernel(mask: Tensor) -> Tensor:
    """Count the kept weights of every kernel."""
    return mask.flatten(2).sum(2).double() if mask.dim() > 2 else mask.double()


def place_at_random(counts: Tensor, usable: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask with ``counts`` weights in the kernels, at random among the ``usable`` ones."""
    return take_best_taps(torch.rand(usable.shape, generator=generator), counts, usable)


def take_best_taps(scores: Tensor, counts: Tensor, usable: Tensor) -> Tensor:
    """Return a mask of the ``counts`` highest scores of every kernel among the ``usable`` weights."""
    ranked = scores.where(usable, -torch.inf).reshape(*usable.shape[:2], -1)
    order = ranked.argsort(2, descending=True)
    rank = torch.empty_like(order).scatter_(2, order, torch.arange(order.shape[2]).expand(order.shape))
    return (rank < counts.unsqueeze(2)).view(usable.shape) & usable


def connect_kernels(
    graph: ChannelGraph,
    masks: Masks,
    counts: Mapping[str, Tensor],
    usable: Masks,
    fixed: Mapping[str, Tensor],
) -> Masks:
    """Move taps of kernels that are effective at channel resolution and dead at spatial resolution.

    On an image of 2 x 2 pixels, two corner taps in a row lead out of it. Such kernels get the taps that most
    paths of the dense network pass, the central ones. Where that connects no more of them, so do the kernels
    on a path of channels with a dead one. Every kernel is moved once at most; the masks with the fewest dead
    kernels are returned.
    """
    wanted = _effective_channels(graph, {**fixed, **masks})
    moved = {
        name: torch.zeros_like(counts[name], dtype=torch.bool)
        for name, mask in masks.items()
        if mask.dim() > 2
    }
    taps: dict[str, Tensor] = {}
    best, fewest, before = masks, math.inf, math.inf
    while True:
        effective = reach(graph, {**fixed, **masks})
        dead = {name: wanted[name] & (count_per_kernel(effective[name]) == 0) for name in masks}
        number = sum(int(kernels.sum()) for kernels in dead.values())
        if number < fewest:
            best, fewest = masks, number
        chosen = _unmoved(dead, moved)
        if not chosen and number < before:  # go on with their neighbours as long as that helps
            before, chosen = number, _unmoved_neighbours(graph, masks, fixed, dead, moved)
        if not chosen:
            return best
        taps = taps or _dense_tap_gradients(graph)
        masks = dict(masks)
        for name, kernels in chosen.items():
            moved[name] |= kernels
            central = take_best_taps(taps[name].expand(usable[name].shape), counts[name], usable[name])
            masks[name] = torch.where(_over_taps(kernels, central), central, masks[name])


def _unmoved_neighbours(
    graph: ChannelGraph,
    masks: Masks,
    fixed: Mapping[str, Tensor],
    dead: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return unmoved kernels on a path of channels through the dead kernels of one layer.

    That is the first layer with dead kernels for which there are any.
    """
    for name, kernels in dead.items():
        if bool(kernels.any()):
            through = masks[name] & _over_taps(kernels, masks[name])
            neighbours = _unmoved(_effective_channels(graph, {**fixed, **masks, name: through}), moved)
            if neighbours:
                return neighbours
    return {}


def _effective_channels(graph: ChannelGraph, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which kernels are effective at channel resolution."""
    effective = reach(graph, masks, resolution="channel")
    return {name: count_per_kernel(mask) > 0 for name, mask in effective.items()}


def _unmoved(kernels: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the kernels with taps that have not been moved, of the layers that have any."""
    unmoved = {name: kernels[name] & ~done for name, done in moved.items()}
    return {name: some for name, some in unmoved.items() if bool(some.any())}


def _dense_tap_gradients(graph: ChannelGraph) -> dict[str, Tensor]:
    """Return d ln R / d weight of every tap of the dense network, summed over the kernels of a layer."""
    dense = {name: torch.ones(own.shape) for name, own in graph.kernels.items()}
    gradients = flow(graph, dense).gradients
    return {name: g.sum((0, 1), keepdim=True) for name, g in gradients.items() if g.dim() > 2}


def _over_taps(kernels: Tensor, mask: Tensor) -> Tensor:
    """Return a view of ``kernels`` that broadcasts over the taps of ``mask``."""
    return kernels.view(*kernels.shape, *[1] * (mask.dim() - 2))
