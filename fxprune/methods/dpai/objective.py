"""What DPaI climbs: paths, nodes and kernels of a masked network, and the direction in which they grow.

Masks, as counts of kept weights per unit, come in; ln R_P, R_N, R_C and an ascent direction for the score of
every unit go out. Two readings serve the same optimiser: on a circuit a unit is a kernel
(``fxprune.methods.dpai.kernel_gradients``), in the full interpreter, here, it is a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fxprune.graph.ir import ChannelGraph, KernelSet
from fxprune.paths.count import flow

__all__ = [
    "BLOCK",
    "LARGEST",
    "SMALLEST",
    "SOFT",
    "Field",
    "Figures",
    "Mixture",
    "Reading",
    "WeightReading",
    "count_nodes",
]

BLOCK = 1 << 19
"""Units that a direction is computed and used for in one go; it is what fits into a core's cache."""
SMALLEST, LARGEST = 1e-15, 1e15
"""Derivatives below move nothing in float32, but are slow; those above would overflow when squared."""
SOFT = 1e-9
"""What a pruned weight counts while the kept ones make no path: the paths with the fewest of them decide."""


class Figures(NamedTuple):
    """``log_paths``: ln R_P. ``nodes``: R_N and ``kernels``: R_C, for a large gamma, where tanh counts."""

    log_paths: float
    nodes: int
    kernels: int


@dataclass(frozen=True)
class Mixture:
    """(1 - alpha) ln R_P + alpha [(1 - beta) ln R_N + beta ln R_C] (Xiang et al. 2025, sec. 3.2)."""

    alpha: float
    beta: float

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of ln paths, ln nodes and ln kernels."""
        return 1 - self.alpha, self.alpha * (1 - self.beta), self.alpha * self.beta

    def value(self, figures: Figures) -> float:
        """The objective; terms of weight zero do not count even where they are infinite."""
        terms = (
            figures.log_paths,
            math.log(figures.nodes) if figures.nodes else -math.inf,
            math.log(figures.kernels) if figures.kernels else -math.inf,
        )
        return sum(weight * term for weight, term in zip(self.weights, terms, strict=True) if weight)

    def factor(self, alive: Tensor, kernels: KernelSet) -> Tensor:
        """What d ln R_P / d mask of the weights in each kernel is multiplied by, shaped as the kernels.

        ``alive``: kernels on a path. The derivatives of ln R_N and ln R_C (eq. 6) are those of ln R_P where
        the node, or the kernel, is on no path yet, and zero elsewhere; their constant factors are dropped.
        """
        dead_node = ~node_any(alive, kernels)
        for_paths, for_nodes, for_kernels = self.weights
        return for_paths + for_nodes * dead_node.float() + for_kernels * (~alive).float()


def node_any(marked: Tensor, kernels: KernelSet) -> Tensor:
    """For every kernel whether any kernel into the same output channel is marked (bool, kernels' shape)."""
    if not kernels.transposed:
        return marked.any(1, keepdim=True).expand(marked.shape)
    apart = marked.reshape(kernels.groups, -1, marked.shape[1])
    return apart.any(1, keepdim=True).expand(apart.shape).reshape(marked.shape)


def count_nodes(kernels: KernelSet, marked: Tensor) -> Tensor:
    """Output channels with a marked kernel (bool, of the kernels' shape), as a scalar tensor."""
    if not kernels.transposed:
        return marked.any(1).sum()
    return marked.reshape(kernels.groups, -1, marked.shape[1]).any(1).sum()


@dataclass
class Field:
    """Units of some layers, one after another: what an optimiser and a reading share.

    ``counts``: kept weights of every unit; ``where``: the units of each layer. ``kept``: of a single layer
    with one weight per unit, the places of the kept units, ascending (int64), instead of ``counts``.
    """

    counts: Tensor
    where: dict[str, slice]
    kept: Tensor | None = None


class Reading(Protocol):
    """How an optimiser reads a network. ``widths``: weights per unit, by layer; ``dtype``: of the counts;
    ``listable``: the layers for which places of kept units will do.
    """

    widths: dict[str, int]
    dtype: torch.dtype
    listable: frozenset[str]

    def attach(self, fields: list[Field]) -> None:
        """Where ``climb`` reads counts from now on."""

    def climb(self) -> float:
        """Reads the network at the present counts; returns ln R_P."""

    def blocks(self, field: int) -> list[slice]:
        """The units of a field, in parts whose directions are asked for one at a time."""

    def direction(self, field: int, block: int) -> Tensor:
        """Where the scores of a block should go (float32, one number per unit), since the last ``climb``.

        The tensor is the caller's until the next call.
        """

    def is_moderate(self, field: int) -> bool:
        """Whether directions in a field are known to be zero, or from ``SMALLEST`` to ``LARGEST``."""

    def figures(self) -> Figures:
        """Those of the last ``climb``."""


class WeightReading:
    """Every weight is a unit: the interpreter itself, at either resolution, on any graph.

    ``fixed``: masks of parameters that are not to be pruned.
    """

    dtype = torch.float32
    listable: frozenset[str] = frozenset()

    def __init__(
        self,
        graph: ChannelGraph,
        names: list[str],
        fixed: Mapping[str, Tensor],
        mixture: Mixture,
        resolution: Literal["spatial", "channel"],
        device: torch.device,
    ) -> None:
        self.kernels = {name: graph.kernels[name] for name in names}
        self.graph, self.mixture, self.device = graph, mixture, device
        self.resolution: Literal["spatial", "channel"] = resolution
        self.fixed = {name: mask.to(device, torch.float32) for name, mask in fixed.items()}
        self.widths = dict.fromkeys(names, 1)
        self.counts: dict[str, Tensor] = {}
        self.directions: dict[str, Tensor] = {}
        self._whole: list[Tensor] = []
        self._found = Figures(-math.inf, 0, 0)

    def attach(self, fields: list[Field]) -> None:
        self._whole = [torch.zeros(len(field.counts)) for field in fields]
        for field, whole in zip(fields, self._whole, strict=True):
            for name, where in field.where.items():
                shape = self.kernels[name].shape
                self.counts[name] = field.counts[where].view(shape)
                self.directions[name] = whole[where].view(shape)

    def blocks(self, field: int) -> list[slice]:
        size = len(self._whole[field])
        return [slice(start, min(size, start + BLOCK)) for start in range(0, size, BLOCK)]

    def direction(self, field: int, block: int) -> Tensor:
        return self._whole[field][self.blocks(field)[block]]

    def is_moderate(self, field: int) -> bool:
        return False

    def climb(self) -> float:
        masks = {name: kept.to(self.device) for name, kept in self.counts.items()}
        found = flow(self.graph, masks | self.fixed, resolution=self.resolution)
        if found.log_total == -math.inf:
            self._climb_softly(masks)
            return found.log_total
        nodes = kernels = 0
        for name, mask in masks.items():
            gradient, own = found.gradients[name], self.kernels[name]
            effective = (gradient > 0) & (mask > 0)
            alive = effective.flatten(2).any(2) if effective.dim() > 2 else effective
            factor = self.mixture.factor(alive, own)
            factor = factor.view(*factor.shape, *[1] * (gradient.dim() - 2))
            self.directions[name].copy_(gradient * factor)
            nodes += int(count_nodes(own, alive))
            kernels += int(alive.sum())
        self._found = Figures(found.log_total, nodes, kernels)
        return found.log_total

    def _climb_softly(self, masks: dict[str, Tensor]) -> None:
        """Towards a first path: whatever has a share in the paths that lack the fewest weights rises."""
        soft = {name: mask + SOFT * (1 - mask) for name, mask in masks.items()}
        gradients = flow(self.graph, soft | self.fixed, resolution=self.resolution).gradients
        for name, mask in soft.items():
            self.directions[name].copy_(gradients[name] * mask)
        self._found = Figures(-math.inf, 0, 0)

    def figures(self) -> Figures:
        return self._found
