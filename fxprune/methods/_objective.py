"""What DPaI climbs: paths, nodes and kernels of a masked network, and the direction in which they grow.

Masks, as counts of kept weights per unit, come in; ln R_P, R_N, R_C and an ascent direction for the score of
every unit go out. Two readings serve the same optimiser: on a circuit a unit is a kernel, in the full
interpreter it is a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fxprune.graph.channels import Circuit, Pass
from fxprune.graph.ir import ChannelGraph, KernelSet
from fxprune.graph.traverse import flow

__all__ = ["Field", "Figures", "KernelReading", "Mixture", "Reading", "WeightReading"]

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


def count_nodes(kernels: KernelSet, marked: Tensor) -> int:
    """Output channels with a marked kernel (bool, of the kernels' shape)."""
    if not kernels.transposed:
        return int(marked.any(1).sum())
    return int(marked.reshape(kernels.groups, -1, marked.shape[1]).any(1).sum())


@dataclass
class Field:
    """Units of some layers, one after another: what an optimiser and a reading share.

    ``counts``: kept weights of every unit; ``direction`` (float32): where its score should go; ``where``: the
    units of each layer.
    """

    counts: Tensor
    direction: Tensor
    where: dict[str, slice]


class Reading(Protocol):
    """How an optimiser reads a network. ``widths``: weights per unit, by layer; ``dtype``: of the counts."""

    widths: dict[str, int]
    dtype: torch.dtype

    def attach(self, fields: list[Field]) -> None:
        """Where ``climb`` reads and writes from now on."""

    def climb(self) -> float:
        """Writes the direction of every unit, for the present counts; returns ln R_P."""

    def figures(self) -> Figures:
        """Those of the last ``climb``."""


class WeightReading:
    """Every weight is a unit: the interpreter itself, at either resolution, on any graph.

    ``fixed``: masks of parameters that are not to be pruned.
    """

    dtype = torch.float32

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
        self._found = Figures(-math.inf, 0, 0)

    def attach(self, fields: list[Field]) -> None:
        for field in fields:
            for name, where in field.where.items():
                shape = self.kernels[name].shape
                self.counts[name] = field.counts[where].view(shape)
                self.directions[name] = field.direction[where].view(shape)

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
            nodes += count_nodes(own, alive)
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


class KernelReading:
    """Every kernel is a unit; in layers with taps that only ever see padding, every weight is.

    ``fixed``: masks of parameters that are not to be pruned.
    """

    def __init__(
        self, circuit: Circuit, names: list[str], fixed: Mapping[str, Tensor], mixture: Mixture
    ) -> None:
        self.circuit, self.mixture, self.dtype = circuit, mixture, circuit.dtype
        self.kernels = {name: circuit.kernels[name] for name in names}
        self.whole = {name: bool(own.live_taps.all()) for name, own in self.kernels.items()}
        self.widths = {
            name: own.shape[2:].numel() if self.whole[name] else 1 for name, own in self.kernels.items()
        }
        self.counts = {name: circuit.dense(name) for name in circuit.kernels}
        self.counts |= {name: self._counted(name, mask) for name, mask in fixed.items()}
        self.uses: dict[str, list[int]] = {name: [] for name in names}
        for place, op in enumerate(circuit.contractions):
            if op.name in self.uses:
                self.uses[op.name].append(place)
        self._plain = [name for name in names if self._is_plain(name)]
        self._places = [self.uses[name][0] for name in self._plain]
        self._others = [name for name in names if name not in self._plain]

    def _is_plain(self, name: str) -> bool:
        """One use, one position, no view: its direction is one outer product."""
        if len(self.uses[name]) != 1 or not self.whole[name] or self.kernels[name].transposed:
            return False
        op = self.circuit.contractions[self.uses[name][0]]
        return op.rows == 1 and op.groups == 1 and op.is_whole

    def _counted(self, name: str, kept: Tensor) -> Tensor:
        """Kept live weights of every kernel, from those of every weight."""
        own = self.circuit.kernels[name]
        taps = kept.to("cpu", self.dtype).view(*own.shape[:2], -1)
        return (taps * own.live_taps.flatten().to(self.dtype)).sum(2)

    def attach(self, fields: list[Field]) -> None:
        self.fields = fields
        self.given = {name: field.counts[where] for field in fields for name, where in field.where.items()}
        self.directions = {
            name: field.direction[where].view(*self.kernels[name].shape[:2], *[-1] * (not self.whole[name]))
            for field in fields
            for name, where in field.where.items()
        }
        for name, kept in self.given.items():
            if self.whole[name]:
                self.counts[name] = kept.view(self.kernels[name].shape[:2])
        self._nodes = [self._nodes_of(field) for field in fields]

    def _nodes_of(self, field: Field) -> Tensor:
        """For every unit the place of its output channel among those of all plain layers, or one past them.

        Empty where nobody asks: for a pure objective, or without plain layers.
        """
        if not all(self.mixture.weights[1:]) or not any(name in field.where for name in self._plain):
            return torch.empty(0, dtype=torch.int32)
        first, last = {}, 0
        for name in self._plain:
            first[name] = last
            last += self.kernels[name].shape[0]
        places = torch.full((len(field.counts),), last, dtype=torch.int32)
        for name, where in field.where.items():
            if name in first:
                own = places[where].view(self.kernels[name].shape[:2])
                own.copy_(torch.arange(first[name], first[name] + len(own)).unsqueeze(1))
        return places

    def climb(self) -> float:
        for name, kept in self.given.items():
            if not self.whole[name]:
                self.counts[name] = self._counted(name, kept)
        self.found = self.circuit.run(self.counts)
        if self.found.log_total == -math.inf:
            self._climb_softly()
        else:
            self._climb_plain(self.found)
            for name in self._others:
                gradient = self._gradient(self.found, name)
                alive = (gradient > 0) & (self.counts[name] > 0)
                self._write(name, gradient * self.mixture.factor(alive, self.kernels[name]))
        return self.found.log_total

    def _climb_plain(self, found: Pass) -> None:
        """All layers of one outer product each, in as few operations as can be."""
        if not self._plain:
            return
        for_paths, for_nodes, for_kernels = self.mixture.weights
        slopes = torch.cat([found.slope[place] for place in self._places], 1)[0]
        x = torch.cat([found.x[place] for place in self._places], 1)[0].float()
        dead = None
        if for_nodes:
            y = torch.cat([found.y[place] for place in self._places], 1)[0]
            dead = ((y <= 0) | (slopes <= 0)).float().mul_(for_nodes)
        slopes = slopes.float()
        if not for_kernels and dead is not None:
            slopes *= dead + for_paths
        heights = [self.kernels[name].shape[0] for name in self._plain]
        widths = [self.kernels[name].shape[1] for name in self._plain]
        for name, slope, part in zip(
            self._plain, torch.split(slopes, heights), torch.split(x, widths), strict=True
        ):
            torch.outer(slope, part, out=self.directions[name])
        if not for_kernels:
            return
        if dead is not None:
            dead = torch.cat([dead, dead.new_zeros(1)])
        for field, node in zip(self.fields, self._nodes, strict=True):
            factor = (field.counts == 0).float().mul_(for_kernels).add_(for_paths)
            if dead is not None and len(node):
                factor += dead.index_select(0, node)
            field.direction.mul_(factor)

    def _climb_softly(self) -> None:
        """Towards a first path: whatever has a share in the paths that lack the fewest weights rises."""
        dense = {name: self.circuit.dense(name) for name in self.kernels}
        soft = {
            name: counts + SOFT * (dense[name] - counts)
            for name, counts in self.counts.items()
            if name in dense
        }
        found = self.circuit.run(self.counts | soft)
        for name in self.kernels:
            self._write(name, self._gradient(found, name) * soft[name].float())

    def _gradient(self, found: Pass, name: str) -> Tensor:
        """d ln R_P / d count, shaped as the kernels."""
        gradient = torch.zeros(self.kernels[name].shape[:2])
        for place in self.uses[name]:
            op = self.circuit.contractions[place]
            op.spread(found.slope[place].float(), found.x[place].float(), gradient, add=True)
        return gradient

    def _write(self, name: str, direction: Tensor) -> None:
        if self.whole[name]:
            self.directions[name].copy_(direction)
        else:
            live = self.kernels[name].live_taps.flatten().float()
            torch.mul(direction.unsqueeze(2), live, out=self.directions[name])

    def figures(self) -> Figures:
        nodes = kernels = 0
        if self.found.log_total > -math.inf:
            for name, own in self.kernels.items():
                alive = (self._gradient(self.found, name) > 0) & (self.counts[name] > 0)
                nodes += count_nodes(own, alive)
                kernels += int(alive.sum())
        return Figures(self.found.log_total, nodes, kernels)
