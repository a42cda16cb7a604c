"""Compute DPaI's score gradients with the path interpreter, at either resolution and on any graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph
from fxprune.methods.dpai.objective import (
    BLOCK,
    PRUNED_COUNT,
    Figures,
    Objective,
    UnitGroup,
    sum_nodes,
)
from fxprune.paths.count import flow

__all__ = ["WeightGradients"]


class WeightGradients:
    """Compute the gradient by the score of every single weight: each weight is a unit.

    ``fixed``: masks of parameters that are not pruned. The other methods are those of
    :class:`fxprune.methods.dpai.objective.ScoreGradients`.
    """

    dtype = torch.float32
    indexable: frozenset[str] = frozenset()

    def __init__(
        self,
        graph: ChannelGraph,
        names: list[str],
        fixed: Mapping[str, Tensor],
        objective: Objective,
        resolution: Literal["spatial", "channel"],
        device: torch.device,
    ) -> None:
        self.kernels = {name: graph.kernels[name] for name in names}
        self.graph, self.objective, self.device = graph, objective, device
        self.resolution: Literal["spatial", "channel"] = resolution
        self.fixed = {name: mask.to(device, torch.float32) for name, mask in fixed.items()}
        self.widths = dict.fromkeys(names, 1)
        # Views by layer: the masks as they are handed over, and the gradients of each group.
        self._masks: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._gradients_of_group: list[Tensor] = []
        self._figures = Figures(-math.inf, 0, 0)

    def attach(self, groups: list[UnitGroup]) -> None:
        self._gradients_of_group = [torch.zeros(len(group.counts)) for group in groups]
        for group, gradients in zip(groups, self._gradients_of_group, strict=True):
            for name, units in group.units.items():
                shape = self.kernels[name].shape
                self._masks[name] = group.counts[units].view(shape)
                self._gradients[name] = gradients[units].view(shape)

    def blocks(self, group: int) -> list[slice]:
        size = len(self._gradients_of_group[group])
        return [slice(start, min(size, start + BLOCK)) for start in range(0, size, BLOCK)]

    def gradient(self, group: int, block: int) -> Tensor:
        return self._gradients_of_group[group][self.blocks(group)[block]]

    def is_in_range(self, group: int) -> bool:
        return False

    def evaluate(self) -> float:
        masks = {name: mask.to(self.device) for name, mask in self._masks.items()}
        found = flow(self.graph, masks | self.fixed, resolution=self.resolution)
        if found.log_total == -math.inf:
            self._evaluate_softened(masks)
            return found.log_total
        nodes = kernels = 0
        for name, mask in masks.items():
            gradient, layer = found.gradients[name], self.kernels[name]
            is_effective = (gradient > 0) & (mask > 0)
            effective = is_effective.flatten(2).any(2) if is_effective.dim() > 2 else is_effective
            factor = self.objective.gradient_factor(effective, layer)
            factor = factor.view(*factor.shape, *[1] * (gradient.dim() - 2))
            self._gradients[name].copy_(gradient * factor)
            nodes += int(sum_nodes(layer, effective))
            kernels += int(effective.sum())
        self._figures = Figures(found.log_total, nodes, kernels)
        return found.log_total

    def _evaluate_softened(self, masks: dict[str, Tensor]) -> None:
        """Compute gradients towards a first path, where the masks make none.

        Pruned weights count ``PRUNED_COUNT``, so that the paths with the fewest of them dominate R. The
        gradient is d ln R / d ln count: the share of the paths that go through a weight.
        """
        softened = {name: mask + PRUNED_COUNT * (1 - mask) for name, mask in masks.items()}
        gradients = flow(self.graph, softened | self.fixed, resolution=self.resolution).gradients
        for name, count in softened.items():
            self._gradients[name].copy_(gradients[name] * count)
        self._figures = Figures(-math.inf, 0, 0)

    def figures(self) -> Figures:
        return self._figures
