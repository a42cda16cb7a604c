"""Keep the two factors of every layer whose kernel gradient is one outer product.

That is so for layers that the network reads once, as a whole and in one group. With x[r, i] paths into the
input channel i and slope[r, o] = d ln R_P / d output o, at the position r (most layers have one, as positions
are alike at channel resolution),

    d ln R_P / d count[o, i] = sum over r of slope[r, o] * x[r, i].

The objective multiplies this by (p + n [node o is on no path] + c [kernel (o, i) is on no path]) with its
weights p, n, c of paths, nodes and kernels
(:meth:`fxprune.methods.dpai.objective.Objective.gradient_factor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.methods.dpai.objective import LARGEST, SMALLEST
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.circuit.parts import Contraction

__all__ = ["OuterFactors", "is_outer_product"]


def is_outer_product(circuit: Circuit, name: str, uses: Sequence[int]) -> bool:
    """Return whether the gradient of a layer with these uses (contractions of the circuit) is one product."""
    if len(uses) != 1 or circuit.kernels[name].transposed:
        return False
    op = circuit.contractions[uses[0]]
    return op.groups == 1 and op.is_whole


class OuterFactors:
    """The factors of all such layers, in buffers that hold one layer after another.

    ``places``: the contraction of each layer in the circuit. ``slopes`` and ``x`` are views by layer, of
    shape (positions, channels), or (channels,) where there is one position; ``node_factors``, of shape
    (outputs, 1), is p + n [node is on no path]. ``weights``: p, n, c of the objective.
    """

    def __init__(
        self,
        circuit: Circuit,
        places: Mapping[str, int],
        weights: tuple[float, float, float],
        device: torch.device,
    ) -> None:
        self.places, self.weights = dict(places), weights
        self._ops: dict[str, Contraction] = {name: circuit.contractions[i] for name, i in places.items()}
        self._positions = [op.rows for op in self._ops.values()]
        shapes = [circuit.kernels[name].shape for name in places]
        heights = [shape[0] for shape in shapes]
        self._outputs = [rows * height for rows, height in zip(self._positions, heights, strict=True)]
        inputs = [rows * shape[1] for rows, shape in zip(self._positions, shapes, strict=True)]
        self._all_slopes, self.slopes = self._buffer(self._outputs, device)
        self._all_x, self.x = self._buffer(inputs, device)
        self._all_node_factors = torch.empty(sum(heights), device=device)
        columns = torch.split(self._all_node_factors.unsqueeze(1), heights)
        self.node_factors = dict(zip(places, columns, strict=True))

    def _buffer(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Allocate a buffer for ``sizes`` numbers of each layer; return it, and the view of each layer."""
        whole = torch.empty(sum(sizes), device=device)
        parts = zip(self.places, self._positions, torch.split(whole, list(sizes)), strict=True)
        return whole, {name: part if rows == 1 else part.view(rows, -1) for name, rows, part in parts}

    def load(self, found: Pass) -> None:
        """Copy slopes and inputs of a run; multiply the slopes by all of the factor that is alike in a node.

        With a weight of kernels, the factor differs inside a node, and slopes stay those of ln R_P.
        """
        for_paths, for_nodes, for_kernels = self.weights
        slopes = self._concatenate(found.slope)
        self._copy(slopes, found)
        if for_nodes:
            is_effective = self._any_position((self._concatenate(found.y) > 0) & (slopes > 0))
            torch.logical_not(is_effective, out=self._all_node_factors).mul_(for_nodes).add_(for_paths)
            if not for_kernels:
                self._scale_slopes_by_node()
        elif not for_kernels and for_paths != 1:
            self._all_slopes.mul_(for_paths)

    def load_unscaled(self, found: Pass) -> None:
        """Copy slopes and inputs of a run, for the gradient of ln R_P alone."""
        self._copy(self._concatenate(found.slope), found)

    def scale_for_pruned(self, name: str) -> Tensor:
        """Multiply the slopes of a layer by the factor of its pruned kernels, where kernels have a weight.

        Pruned kernels are on no path: their factor is p + n [node is on no path] + c. Returns, for every
        output channel, what kept kernels are to be multiplied by, to have the factor without c instead.
        """
        for_paths, for_nodes, for_kernels = self.weights
        node = self.node_factors[name].squeeze(1) if for_nodes else torch.tensor(for_paths)
        self.slopes[name].mul_(node + for_kernels)
        return (node / (node + for_kernels)).expand(len(self.node_factors[name]))

    def is_in_range(self, name: str) -> bool:
        """Return whether all products are zero, or from ``SMALLEST`` to ``LARGEST``; float32 on a CPU."""
        x = self.x[name]
        (least, most), (least_x, most_x) = _positive_range(self.slopes[name]), _positive_range(x)
        return least * least_x > SMALLEST and most * most_x * x.numel() < LARGEST

    def by_position(self, found: Pass, name: str) -> tuple[Tensor, Tensor]:
        """Return the slopes and inputs of a run, of shape (positions, channels), in the circuit's dtype."""
        op, place = self._ops[name], self.places[name]
        return op.by_row(found.slope[place]), op.by_row(found.x[place])

    def _copy(self, slopes: Tensor, found: Pass) -> None:
        self._all_slopes.copy_(slopes)
        self._all_x.copy_(self._concatenate(found.x))

    def _concatenate(self, values: Sequence[Tensor]) -> Tensor:
        """Concatenate the values of these layers, out of those of all contractions."""
        return torch.cat([values[place] for place in self.places.values()])

    def _any_position(self, flags: Tensor) -> Tensor:
        """Return, for the output channels of all layers, whether any position is flagged."""
        if max(self._positions) == 1:
            return flags
        parts = zip(torch.split(flags, self._outputs), self._positions, strict=True)
        return torch.cat([part.view(rows, -1).any(0) for part, rows in parts])

    def _scale_slopes_by_node(self) -> None:
        if max(self._positions) == 1:
            self._all_slopes.mul_(self._all_node_factors)
            return
        for name, slope in self.slopes.items():
            slope.mul_(self.node_factors[name].squeeze(1))


def _positive_range(values: Tensor) -> tuple[float, float]:
    """Return a bound just below the least value above zero (NaN for none), and the largest value.

    ``values``: float32, none negative. Read as integers they keep their order; less one, zeros come last.
    """
    array = values.numpy()
    least = (array.view(np.uint32) - np.uint32(1)).min()
    return float(least.view(np.float32)), float(array.max())
