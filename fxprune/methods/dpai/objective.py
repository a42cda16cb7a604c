"""Define the objective of DPaI, and what its optimisers ask of a class that computes score gradients.

Two classes compute them: :class:`fxprune.methods.dpai.kernel_gradients.KernelGradients` on a circuit, and
:class:`fxprune.methods.dpai.weight_gradients.WeightGradients` on any graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fxprune.channels.counts import has_incoming
from fxprune.graph.ir import KernelSet

__all__ = [
    "BLOCK",
    "LARGEST",
    "PRUNED_COUNT",
    "SMALLEST",
    "Figures",
    "Objective",
    "ScoreGradients",
    "UnitGroup",
    "sum_nodes",
]

BLOCK = 1 << 19
"""Units whose gradient is computed and used at a time; their numbers fit into a core's cache."""
SMALLEST, LARGEST = 1e-15, 1e15
"""Gradients below move nothing in float32, but are slow; those above would overflow when squared."""
PRUNED_COUNT = 1e-9
"""Count of a pruned weight while the kept ones make no path: the paths with the fewest of them dominate."""


class Figures(NamedTuple):
    """The three quantities of DPaI: ``log_paths`` is ln R_P, ``nodes`` is R_N and ``kernels`` is R_C.

    The paper's tanh(gamma N) of nodes and kernels is taken for a large gamma, where it counts them.
    """

    log_paths: float
    nodes: int
    kernels: int


@dataclass(frozen=True)
class Objective:
    """(1 - alpha) ln R_P + alpha [(1 - beta) ln R_N + beta ln R_C] (Xiang et al. 2025, sec. 3.2)."""

    alpha: float
    beta: float

    @property
    def weights(self) -> tuple[float, float, float]:
        """The weights of ln R_P, ln R_N and ln R_C."""
        return 1 - self.alpha, self.alpha * (1 - self.beta), self.alpha * self.beta

    def value(self, figures: Figures) -> float:
        """Return the objective; terms of weight zero do not count even where they are infinite."""
        terms = (
            figures.log_paths,
            math.log(figures.nodes) if figures.nodes else -math.inf,
            math.log(figures.kernels) if figures.kernels else -math.inf,
        )
        return sum(weight * term for weight, term in zip(self.weights, terms, strict=True) if weight)

    def gradient_factor(self, effective: Tensor, kernels: KernelSet) -> Tensor:
        """Return the gradient of the objective divided by d ln R_P / d mask, for every kernel of a layer.

        ``effective``: whether each kernel is on a path. The derivatives of ln R_N and ln R_C (eq. 6) are
        those of ln R_P where the node, or the kernel, is on no path yet, and zero elsewhere; their constant
        factors are dropped. With the weights p, n and c of the objective, the factor of the kernel (o, i) is
        p + n [node o is on no path] + c [kernel (o, i) is on no path].
        """
        is_dead_node = ~_any_in_node(effective, kernels)
        for_paths, for_nodes, for_kernels = self.weights
        return for_paths + for_nodes * is_dead_node.float() + for_kernels * (~effective).float()


def _any_in_node(flags: Tensor, kernels: KernelSet) -> Tensor:
    """For every kernel, return whether any kernel into the same output channel is flagged."""
    if not kernels.transposed:
        return flags.any(1, keepdim=True).expand(flags.shape)
    by_group = flags.reshape(kernels.groups, -1, flags.shape[1])
    return by_group.any(1, keepdim=True).expand(by_group.shape).reshape(flags.shape)


def sum_nodes(kernels: KernelSet, flags: Tensor) -> Tensor:
    """Count the output channels with a flagged kernel (bool, of the kernels' shape), as a scalar tensor."""
    return has_incoming(kernels, flags).sum()


@dataclass
class UnitGroup:
    """Units of some layers, one after another: the masks, as an optimiser hands them to the gradients.

    ``counts``: kept weights of every unit; ``units``: the slice of each layer. ``kept``: for a single layer
    with one weight per unit, the ascending indices of the kept units (int64), instead of ``counts``.
    """

    counts: Tensor
    units: dict[str, slice]
    kept: Tensor | None = None


class ScoreGradients(Protocol):
    """Compute the gradient of an :class:`Objective` by the scores of all units.

    ``widths``: weights per unit, by layer; ``dtype``: that of the counts; ``indexable``: the layers whose
    masks may be handed over as indices of kept units.
    """

    widths: dict[str, int]
    dtype: torch.dtype
    indexable: frozenset[str]

    def attach(self, groups: list[UnitGroup]) -> None:
        """Read the masks from ``groups`` from now on."""

    def evaluate(self) -> float:
        """Count the paths under the present masks, as :meth:`gradient` needs them; return ln R_P."""

    def blocks(self, group: int) -> list[slice]:
        """Return the parts of a group for which :meth:`gradient` is called one at a time."""

    def gradient(self, group: int, block: int) -> Tensor:
        """Return the gradient by the scores of a block's units (float32), at the last :meth:`evaluate`.

        The tensor is the caller's until the next call.
        """

    def is_in_range(self, group: int) -> bool:
        """Return whether gradients are known to be zero, or from ``SMALLEST`` to ``LARGEST``."""

    def figures(self) -> Figures:
        """Return the figures at the last :meth:`evaluate`."""
