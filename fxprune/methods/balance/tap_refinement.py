"""Improve masks layer by layer with the gradient of every single weight at spatial resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph
from fxprune.methods.balance.layer_moves import cover_channels, oriented
from fxprune.methods.balance.tap_placement import count_per_kernel, take_best_taps
from fxprune.methods.balance.target import Target
from fxprune.methods.dpai.objective import Figures, sum_nodes
from fxprune.paths.count import flow
from fxprune.sparsity.masks import Masks

__all__ = ["TapRefinement"]

ROUNDS = 2
"""Rounds over all layers, at most."""
TAP_ROUNDS = 2
"""Times that the taps of all layers are moved at once."""
STAY_BONUS, COVER_BONUS = 1e-9, 1e9
"""Added to the gradient of kept weights, which stay among equals, and of the weights that cover a channel."""


@dataclass
class _Candidate:
    """Masks with their figures and d ln R / d weight, at spatial resolution."""

    masks: Masks
    figures: Figures
    gradients: dict[str, Tensor]


class TapRefinement:
    """Increase a target at spatial resolution, every layer keeping its number of weights.

    ``usable``: which weights may be kept; ``fixed``: masks of all other parameters.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        usable: Masks,
        fixed: Mapping[str, Tensor],
        target: Target,
        random: np.random.Generator,
    ) -> None:
        self.graph, self.usable, self.fixed = graph, usable, dict(fixed)
        self.target, self.random = target, random

    def refine(self, masks: Masks) -> Masks:
        """Return masks that are no worse by the target: first taps move, then whole layers are rewritten."""
        state = self._evaluate(masks)
        for _ in range(TAP_ROUNDS):
            state = self._better_of(state, self._move_taps(state))
        order = list(masks)
        for turn in range(ROUNDS):
            before = state
            for name in order[:: 1 if turn % 2 else -1]:
                state = self._better_of(state, {name: self._rewrite_layer(state, name)})
            if state is before:
                break
        return state.masks

    def _evaluate(self, masks: Masks) -> _Candidate:
        edges = {name: mask.double() for name, mask in {**self.fixed, **masks}.items()}
        found = flow(self.graph, edges, dtype=torch.float64)
        nodes = kernels = 0
        for name, mask in masks.items():
            effective = count_per_kernel(mask & (found.gradients[name] > 0)) > 0
            nodes += int(sum_nodes(self.graph.kernels[name], effective))
            kernels += int(effective.sum())
        return _Candidate(masks, Figures(found.log_total, nodes, kernels), found.gradients)

    def _better_of(self, state: _Candidate, change: Masks) -> _Candidate:
        """Return the state with some masks changed, if that is better by the target, else the state."""
        if all(torch.equal(state.masks[name], mask) for name, mask in change.items()):
            return state
        trial = self._evaluate({**state.masks, **change})
        return trial if self.target.value(trial.figures) > self.target.value(state.figures) else state

    def _move_taps(self, state: _Candidate) -> Masks:
        """Return masks of as many weights in every kernel, on the taps of the highest gradient."""
        return {
            name: take_best_taps(state.gradients[name], count_per_kernel(mask), self.usable[name])
            for name, mask in state.masks.items()
            if mask.dim() > 2
        }

    def _rewrite_layer(self, state: _Candidate, name: str) -> Tensor:
        """Return the mask of the highest gradients that keeps the layer's effective channels in use.

        R is linear in the layer's weights, so that this is the mask of most paths, but for the cover.
        """
        mask, kernels = state.masks[name], self.graph.kernels[name]
        gradient = state.gradients[name].where(self.usable[name], -1.0)
        taps = gradient.reshape(*gradient.shape[:2], -1)
        best, best_tap = taps.max(2)
        effective = oriented((count_per_kernel(mask & (gradient > 0)) > 0).numpy(), kernels)
        is_cover = torch.zeros_like(best, dtype=torch.bool)
        number = int(mask.sum())
        oriented(is_cover.numpy(), kernels)[...] = cover_channels(
            np.any(effective, axis=1),
            np.any(effective, axis=2),
            oriented(best.numpy(), kernels),
            oriented(count_per_kernel(self.usable[name]).numpy(), kernels),
            number,
            self.random,
        )
        scores = taps + STAY_BONUS * mask.reshape(taps.shape)
        scores.scatter_add_(2, best_tap.unsqueeze(2), COVER_BONUS * is_cover.unsqueeze(2).double())
        flat = scores.flatten()
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.topk(number).indices] = True
        return chosen.view(mask.shape)
