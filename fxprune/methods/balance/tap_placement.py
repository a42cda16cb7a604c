"""Where weights go inside their kernels, position by position.

Numbers of kept weights per kernel come in, or masks; masks go out. A search at channel resolution sees
periodic images, on which all taps of a kernel are alike. On real ones central taps have more paths than those
at a border, and kernels that were alike differ a little. R is linear in the weights of one layer here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph
from fxprune.methods.balance.layer_moves import cover, oriented
from fxprune.methods.balance.target import Aim
from fxprune.methods.dpai.objective import Figures, count_nodes
from fxprune.paths.count import flow, reach
from fxprune.sparsity.masks import Masks

__all__ = ["Polish", "counted", "placed", "settled_inside"]

ROUNDS = 2
"""Times that every layer is tried."""


def counted(mask: Tensor) -> Tensor:
    """Kept weights of every kernel."""
    return mask.flatten(2).sum(2).double() if mask.dim() > 2 else mask.double()


def placed(counts: Tensor, usable: Tensor, generator: torch.Generator) -> Tensor:
    """Masks with so many weights in every kernel, anywhere."""
    return _best(torch.rand(usable.shape, generator=generator), counts, usable)


def _best(scores: Tensor, counts: Tensor, usable: Tensor) -> Tensor:
    """The ``counts`` highest scores of every kernel among the usable."""
    ranked = scores.where(usable, -torch.inf).reshape(*usable.shape[:2], -1)
    order = ranked.argsort(2, descending=True)
    place = torch.empty_like(order).scatter_(2, order, torch.arange(order.shape[2]).expand(order.shape))
    return (place < counts.unsqueeze(2)).view(usable.shape) & usable


def settled_inside(
    graph: ChannelGraph,
    masks: Masks,
    counts: Mapping[str, Tensor],
    usable: Masks,
    fixed: Mapping[str, Tensor],
) -> Masks:
    """``masks`` with the taps of kernels moved that lie on a path of the channels, but on none of positions.

    On an image of 2 x 2 pixels, two corner taps in a row lead out of it. Such kernels get the taps that most
    paths of the dense network pass, the central ones; where that is not enough, all that share a path of
    channels with them do, until none is left or nothing helps.
    """
    wanted = _on_channels(graph, {**fixed, **masks})
    tried = {
        name: torch.zeros_like(counts[name], dtype=torch.bool)
        for name, mask in masks.items()
        if mask.dim() > 2
    }
    worth: dict[str, Tensor] = {}
    best, fewest, before = masks, math.inf, math.inf
    while True:
        alive = reach(graph, {**fixed, **masks})
        dead = {name: wanted[name] & (counted(alive[name]) == 0) for name in masks}
        number = sum(int(kernels.sum()) for kernels in dead.values())
        if number < fewest:
            best, fewest = masks, number
        lost = _untried(dead, tried)
        if not lost and number < before:  # those around have to be moved, as long as that helps
            before, lost = number, _around(graph, masks, fixed, dead, tried)
        if not lost:
            return best
        if not worth:
            worth = {name: slope.sum((0, 1), keepdim=True) for name, slope in _dense_slopes(graph).items()}
        masks = dict(masks)
        for name, kernels in lost.items():
            tried[name] |= kernels
            central = _best(worth[name].expand(usable[name].shape), counts[name], usable[name])
            at = kernels.view(*kernels.shape, *[1] * (central.dim() - 2))
            masks[name] = torch.where(at, central, masks[name])


def _around(
    graph: ChannelGraph,
    masks: Masks,
    fixed: Mapping[str, Tensor],
    kernels: Mapping[str, Tensor],
    tried: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Untried kernels on a path of channels with ``kernels`` of the first layer where there are such."""
    for name, some in kernels.items():
        if bool(some.any()):
            own = masks[name] & some.view(*some.shape, *[1] * (masks[name].dim() - 2))
            lost = _untried(_on_channels(graph, {**fixed, **masks, name: own}), tried)
            if lost:
                return lost
    return {}


def _on_channels(graph: ChannelGraph, edges: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels on a path of channels, whatever the positions."""
    return {name: counted(mask) > 0 for name, mask in reach(graph, edges, resolution="channel").items()}


def _untried(kernels: Mapping[str, Tensor], tried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose taps can be moved and have not been, by layer, where there are any."""
    found = {name: kernels[name] & ~done for name, done in tried.items()}
    return {name: some for name, some in found.items() if bool(some.any())}


def _dense_slopes(graph: ChannelGraph) -> dict[str, Tensor]:
    """d ln R / d weight of layers with taps, all weights kept."""
    dense = {name: torch.ones(own.shape) for name, own in graph.kernels.items()}
    slopes = flow(graph, dense).gradients
    return {name: slope for name, slope in slopes.items() if slope.dim() > 2}


@dataclass
class _Counted:
    """Masks with their figures at spatial resolution, and d ln R / d weight."""

    masks: Masks
    figures: Figures
    gradients: dict[str, Tensor]


class Polish:
    """Masks rewritten layer by layer with what the interpreter says of every weight.

    ``usable``: which weights may be kept; ``fixed``: masks of all other parameters.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        usable: Masks,
        fixed: Mapping[str, Tensor],
        aim: Aim,
        random: np.random.Generator,
    ) -> None:
        self.graph, self.usable, self.fixed, self.aim, self.random = graph, usable, dict(fixed), aim, random

    def __call__(self, masks: Masks) -> Masks:
        """Masks of as many weights in every layer, no worse by the aim."""
        state = self._counted(masks)
        order = list(masks)
        for group in [order] * 2:  # taps of all layers at once, as long as that helps
            state = self._better(state, self._moved(state, group))
        for turn in range(ROUNDS):
            before = state
            for name in order[:: 1 if turn % 2 else -1]:
                state = self._better(state, {name: self._rewritten(state, name)})
            if state is before:
                break
        return state.masks

    def _counted(self, masks: Masks) -> _Counted:
        edges = {name: mask.double() for name, mask in {**self.fixed, **masks}.items()}
        found = flow(self.graph, edges, dtype=torch.float64)
        nodes = kernels = 0
        for name, mask in masks.items():
            alive = counted(mask & (found.gradients[name] > 0)) > 0
            nodes += int(count_nodes(self.graph.kernels[name], alive))
            kernels += int(alive.sum())
        return _Counted(masks, Figures(found.log_total, nodes, kernels), found.gradients)

    def _better(self, state: _Counted, change: Masks) -> _Counted:
        if all(torch.equal(state.masks[name], mask) for name, mask in change.items()):
            return state
        trial = self._counted({**state.masks, **change})
        return trial if self.aim.value(trial.figures) > self.aim.value(state.figures) else state

    def _moved(self, state: _Counted, names: list[str]) -> Masks:
        """As many weights in every kernel, on the taps of most paths."""
        return {
            name: _best(state.gradients[name], counted(state.masks[name]), self.usable[name])
            for name in names
            if state.masks[name].dim() > 2
        }

    def _rewritten(self, state: _Counted, name: str) -> Tensor:
        """The weights of most paths, channels that are in use staying so."""
        mask, kernels = state.masks[name], self.graph.kernels[name]
        worth = state.gradients[name].where(self.usable[name], -1.0)
        taps = worth.reshape(*worth.shape[:2], -1)
        best, first = taps.max(2)
        alive = oriented((counted(mask & (worth > 0)) > 0).numpy(), kernels)
        covered = torch.zeros_like(best, dtype=torch.bool)
        number = int(mask.sum())
        oriented(covered.numpy(), kernels)[...] = cover(
            np.any(alive, axis=1),
            np.any(alive, axis=2),
            oriented(best.numpy(), kernels),
            oriented(counted(self.usable[name]).numpy(), kernels),
            number,
            self.random,
        )
        scores = taps + 1e-9 * mask.reshape(taps.shape)  # what is as good may stay
        scores.scatter_add_(2, first.unsqueeze(2), 1e9 * covered.unsqueeze(2).double())
        flat = scores.flatten()
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.topk(number).indices] = True
        return chosen.view(mask.shape)
