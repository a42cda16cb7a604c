"""Compute DPaI's score gradients on a circuit, where a unit is a kernel and most gradients outer products.

Gradients are computed block by block, so that nothing as large as the network is ever written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.methods.dpai.kernel_blocks import BlockPart, KernelBlock, allocate_block, split_units
from fxprune.methods.dpai.objective import (
    BLOCK,
    PRUNED_COUNT,
    Figures,
    Objective,
    UnitGroup,
    sum_nodes,
)
from fxprune.methods.dpai.outer_factors import OuterFactors, is_outer_product
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.circuit.parts import Kept

__all__ = ["KernelGradients"]

FEW_POSITIONS = 3
"""Up to so many outer products are faster one after another than as a product of matrices."""


class KernelGradients:
    """Compute the gradient by the scores of kernels, at channel resolution.

    Every kernel is a unit; in layers with taps that only ever see padding, every weight is. ``fixed``: masks
    of parameters that are not pruned. ``block``: units per block. The other methods are those of
    :class:`fxprune.methods.dpai.objective.ScoreGradients`.
    """

    def __init__(
        self,
        circuit: Circuit,
        names: Sequence[str],
        fixed: Mapping[str, Tensor],
        objective: Objective,
        device: torch.device | None = None,
        block: int = BLOCK,
    ) -> None:
        self.circuit, self.objective, self.dtype = circuit, objective, circuit.dtype
        self.device, self.block_size = torch.device("cpu") if device is None else device, block
        self.kernels = {name: circuit.kernels[name] for name in names}
        self._is_per_kernel = {name: bool(own.live_taps.all()) for name, own in self.kernels.items()}
        self.widths = {
            name: own.shape[2:].numel() if self._is_per_kernel[name] else 1
            for name, own in self.kernels.items()
        }
        self._live_taps = {
            name: own.live_taps.flatten().to(self.device, torch.float32)
            for name, own in circuit.kernels.items()
        }
        # Kept weights of every kernel, by layer, as the circuit reads them; first of those that are not
        # pruned.
        self.counts = {
            name: self._count_taps(name, fixed[name]) if name in fixed else self._dense_counts(name)
            for name in circuit.kernels
            if name not in self.kernels
        }
        self._uses: dict[str, list[int]] = {name: [] for name in names}
        for place, op in enumerate(circuit.contractions):
            if op.name in self._uses:
                self._uses[op.name].append(place)
        outer = {
            name: uses[0]
            for name, uses in self._uses.items()
            if self._is_per_kernel[name] and is_outer_product(circuit, name, uses)
        }
        self._factors = OuterFactors(circuit, outer, objective.weights, self.device)
        self.indexable = frozenset(name for name in outer if self.widths[name] == 1)
        # Layers whose masks are indices: their kept units, the same as a matrix, and what multiplies the
        # gradient of kept kernels by output channel (see OuterFactors.scale_for_pruned).
        self._kept_units: dict[str, Tensor] = {}
        self.kept_lists: dict[str, Kept] = {}
        self._kept_factors: dict[str, Tensor] = {}
        # Counts with PRUNED_COUNT for pruned weights, while there is no path; else empty.
        self._softened: dict[str, Tensor] = {}

    def _dense_counts(self, name: str) -> Tensor:
        return self.circuit.dense(name).to(self.device)

    def _count_taps(self, name: str, mask: Tensor) -> Tensor:
        """Count the kept live weights of every kernel."""
        kernels = self.circuit.kernels[name]
        taps = mask.to(self.device, self.dtype).view(*kernels.shape[:2], -1)
        return (taps * self._live_taps[name].to(self.dtype)).sum(2)

    # -- masks and blocks -----------------------------------------------------------------------------------
    def attach(self, groups: list[UnitGroup]) -> None:
        self._groups = groups
        self._indexed = {next(iter(group.units)): group for group in groups if group.kept is not None}
        self._unit_counts = {
            name: group.counts[units]
            for group in groups
            for name, units in group.units.items()
            if name not in self._indexed
        }
        for name, counts in self._unit_counts.items():
            if self._is_per_kernel[name]:
                self.counts[name] = counts.view(self.kernels[name].shape[:2])
        shapes = {name: own.shape for name, own in self.kernels.items()}
        units_of_row = {name: shapes[name][1:].numel() // self.widths[name] for name in shapes}
        is_outer = {name: name in self._factors.places for name in shapes}
        split = [split_units(group.units, shapes, is_outer, self.block_size) for group in groups]
        most = max(units.stop - units.start for blocks in split for units, _ in blocks)
        self._gradient, self._factor = (torch.empty(most, device=self.device) for _ in range(2))
        buffers = self._gradient, self._factor
        self._blocks: list[list[KernelBlock]] = [
            [allocate_block(units, layers, units_of_row, buffers, self._factors) for units, layers in blocks]
            for blocks in split
        ]

    def blocks(self, group: int) -> list[slice]:
        return [block.units for block in self._blocks[group]]

    def _read_masks(self) -> dict[str, Tensor | Kept]:
        """Return the counts of all kernels under the present masks, as the circuit takes them."""
        for name, group in self._indexed.items():
            assert group.kept is not None
            if name not in self._kept_units or self._kept_units[name] is not group.kept:
                self._kept_units[name] = group.kept
                height, width = self.kernels[name].shape[:2]
                out = torch.div(group.kept, width, rounding_mode="floor")
                self.kept_lists[name] = Kept(out, group.kept - out * width, (height, width))
        for name, counts in self._unit_counts.items():
            if not self._is_per_kernel[name]:  # counts are the masks of weights here
                self.counts[name] = self._count_taps(name, counts)
        return {**self.counts, **self.kept_lists}

    # -- evaluation -----------------------------------------------------------------------------------------
    def evaluate(self) -> float:
        found = self.circuit.run(self._read_masks())
        self._log_paths = found.log_total
        self._softened = {}
        if found.log_total == -math.inf:
            self._evaluate_softened()
        else:
            self._cache_factors(found)
        return found.log_total

    def evaluate_ahead(self) -> None:
        """Do the same without waiting for the device: gradients are zero where there is no path."""
        self._softened = {}
        self._cache_factors(self.circuit.run_ahead(self._read_masks()))

    def _cache_factors(self, found: Pass) -> None:
        """Cache output slopes and input path counts; the gradient is their outer product."""
        self._found = found
        if not self._factors.places:
            return
        self._factors.load(found)
        if self.objective.weights[2]:
            for name in self.kept_lists:
                self._kept_factors[name] = self._factors.scale_for_pruned(name)

    def _evaluate_softened(self) -> None:
        """Cache the factors of gradients towards a first path, where the masks make none.

        Pruned weights count ``PRUNED_COUNT``, so that the paths with the fewest of them dominate R. The
        gradient is d ln R / d ln count: the share of the paths that go through a kernel.
        """
        softened: dict[str, Tensor] = {}
        for name in self.kernels:
            dense = self._dense_counts(name)
            if name in self.kept_lists:
                softened[name] = dense * PRUNED_COUNT
                softened[name][self.kept_lists[name].out, self.kept_lists[name].into] = 1.0
            else:
                softened[name] = self.counts[name] + PRUNED_COUNT * (dense - self.counts[name])
        self._softened = softened
        self._found = self.circuit.run(self.counts | softened)
        if self._factors.places:
            self._factors.load_unscaled(self._found)

    # -- gradients ------------------------------------------------------------------------------------------
    def gradient(self, group: int, block: int) -> Tensor:
        units, parts = self._blocks[group][block]
        size = units.stop - units.start
        gradient, factor = self._gradient[:size], self._factor[:size]
        for_paths, for_nodes, for_kernels = self.objective.weights
        has_kernel_factor = bool(for_kernels) and not self._softened
        if self._groups[group].kept is not None:
            for part in parts:
                self._write_outer_product(part)
                if has_kernel_factor:
                    self._rescale_kept(part.name, units, gradient)
            return gradient
        if has_kernel_factor:
            # c [kernel is on no path]: a kept kernel on no path has no gradient, so that empty ones will do.
            torch.eq(self._groups[group].counts[units], 0, out=factor).mul_(for_kernels)
            if not for_nodes:
                factor.add_(for_paths)
        for part in parts:
            if part.node_factor is None:
                self._write_layer_gradient(part)
                if has_kernel_factor:
                    part.factor.fill_(1.0)  # is in the gradient already
                continue
            self._write_outer_product(part)
            if has_kernel_factor and for_nodes:
                part.factor.add_(part.node_factor)
        return gradient.mul_(factor) if has_kernel_factor else gradient

    def is_in_range(self, group: int) -> bool:
        if self._groups[group].kept is None or self._softened:
            return False  # for small layers, to find out costs no less than it may save
        (name,) = self._groups[group].units
        return self._factors.is_in_range(name)

    def _write_outer_product(self, part: BlockPart) -> None:
        """Write the sum over positions of the outer products of slope and x."""
        slope, x = part.slope, part.x
        assert slope is not None, "only of layers with factors"
        assert x is not None, "a product has two factors"
        if x.dim() == 1:
            torch.outer(slope, x, out=part.gradient)
        elif len(x) <= FEW_POSITIONS:
            torch.outer(slope[0], x[0], out=part.gradient)
            for position in range(1, len(x)):
                part.gradient.addr_(slope[position], x[position])
        else:
            torch.mm(slope.t(), x, out=part.gradient)
        if self._softened:
            part.gradient.mul_(self._softened[part.name][part.rows])

    def _rescale_kept(self, name: str, units: slice, gradient: Tensor) -> None:
        """Take the kernel term out of the gradient of the kept units of a block, in an indexed layer."""
        kept = self._kept_units[name].numpy()
        first, last = np.searchsorted(kept, (units.start, units.stop))
        outputs = self.kept_lists[name].out.numpy()[first:last]
        gradient.numpy()[kept[first:last] - units.start] *= self._kept_factors[name].numpy()[outputs]

    def _write_layer_gradient(self, part: BlockPart) -> None:
        """Write the gradient of a layer that is no single outer product."""
        name, kernels = part.name, self.kernels[part.name]
        gradient = self._path_gradient(self._found, name)
        if self._softened:
            gradient = gradient * self._softened[name].float()
        else:
            effective = (gradient > 0) & (self.counts[name] > 0)
            gradient = gradient * self.objective.gradient_factor(effective, kernels)
        if self._is_per_kernel[name]:
            part.gradient.copy_(gradient.flatten())
        else:
            part.gradient.copy_((gradient.unsqueeze(2) * self._live_taps[name]).flatten())

    def _path_gradient(self, found: Pass, name: str) -> Tensor:
        """Return d ln R_P / d count, shaped as the kernels."""
        gradient = torch.zeros(self.kernels[name].shape[:2], device=self.device)
        for place in self._uses[name]:
            op = self.circuit.contractions[place]
            op.spread(found.slope[place].float(), found.x[place].float(), gradient, add=True)
        return gradient

    # -- figures --------------------------------------------------------------------------------------------
    def figures(self) -> Figures:
        if self._log_paths == -math.inf:
            return Figures(-math.inf, 0, 0)
        # Ones and zeros for paths: numbers of branches with far fewer paths than others may underflow.
        on_paths = self.circuit.on_paths({**self.counts, **self.kept_lists})
        totals = [self._count_indexed(on_paths, name) for name in self.kept_lists]
        parts = (part for blocks in self._blocks for block in blocks for part in block.parts)
        totals += [self._count_part(on_paths, part) for part in parts if part.name not in self.kept_lists]
        nodes, kernels = torch.stack([torch.stack(pair) for pair in totals]).sum(0).tolist()
        return Figures(self._log_paths, nodes, kernels)

    def _count_indexed(self, on_paths: Pass, name: str) -> tuple[Tensor, Tensor]:
        """Count the effective nodes and kernels of a layer whose mask is a list of indices."""
        listed = self.kept_lists[name]
        slope, x = self._factors.by_position(on_paths, name)
        effective = (slope[:, listed.out] * x[:, listed.into]).amax(0) > 0
        nodes = torch.zeros(listed.shape[0]).index_fill_(0, listed.out[effective], 1.0).sum().long()
        return nodes, effective.sum()

    def _count_part(self, on_paths: Pass, part: BlockPart) -> tuple[Tensor, Tensor]:
        """Count the effective nodes and kernels of one layer in a block."""
        counts = self.counts[part.name]
        if part.slope is None:
            effective = (self._path_gradient(on_paths, part.name) > 0) & (counts > 0)
            return sum_nodes(self.kernels[part.name], effective), effective.sum()
        slope, x = self._factors.by_position(on_paths, part.name)
        effective = torch.mm(slope[:, part.rows].t(), x) > 0
        effective &= counts[part.rows] > 0
        return effective.any(1).sum(), effective.sum()
