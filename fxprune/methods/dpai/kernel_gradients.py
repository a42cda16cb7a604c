"""The reading of a network on its circuit: a unit is a kernel, and a direction an outer product.

Counts of kept weights per kernel come in; ln R_P, R_N, R_C and the direction of every score go out, block by
block, so that nothing as large as the network is written down on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fxprune.methods.dpai.objective import (
    BLOCK,
    LARGEST,
    SMALLEST,
    SOFT,
    Field,
    Figures,
    Mixture,
    count_nodes,
)
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.circuit.parts import Kept

__all__ = ["KernelReading"]

FEW = 3
"""Up to so many outer products are faster one after another than as a product of matrices."""


class _Piece(NamedTuple):
    """Some units of layer ``name`` in a block: those of the output channels ``rows``, perhaps all of them.

    ``out`` and ``factor`` are their places in the buffers, as (rows, units of a row) where the layer is
    plain; only then are there the parts of what its direction is the product of.
    """

    name: str
    rows: slice
    out: Tensor
    factor: Tensor
    slope: Tensor | None = None
    x: Tensor | None = None
    node: Tensor | None = None


class _Block(NamedTuple):
    part: slice
    pieces: list[_Piece]


class KernelReading:
    """Every kernel is a unit; in layers with taps that only ever see padding, every weight is.

    ``fixed``: masks of parameters that are not to be pruned. All is done on ``device``, ``block`` units at a
    time.
    """

    def __init__(
        self,
        circuit: Circuit,
        names: Sequence[str],
        fixed: Mapping[str, Tensor],
        mixture: Mixture,
        device: torch.device | None = None,
        block: int = BLOCK,
    ) -> None:
        self.circuit, self.mixture, self.dtype = circuit, mixture, circuit.dtype
        self.device, self.size = torch.device("cpu") if device is None else device, block
        self.kernels = {name: circuit.kernels[name] for name in names}
        self.whole = {name: bool(own.live_taps.all()) for name, own in self.kernels.items()}
        self.widths = {
            name: own.shape[2:].numel() if self.whole[name] else 1 for name, own in self.kernels.items()
        }
        self._live = {
            name: own.live_taps.flatten().to(self.device, torch.float32)
            for name, own in circuit.kernels.items()
        }
        self.counts = {
            name: self._counted(name, fixed[name]) if name in fixed else self._dense(name)
            for name in circuit.kernels
            if name not in self.kernels
        }
        self.uses: dict[str, list[int]] = {name: [] for name in names}
        for place, op in enumerate(circuit.contractions):
            if op.name in self.uses:
                self.uses[op.name].append(place)
        # By name, the one contraction of layers with one use and no view: their direction is one product.
        self._plain = {name: self.uses[name][0] for name in names if self._is_plain(name)}
        self.listable = frozenset(name for name in self._plain if self.widths[name] == 1)
        self._rows = [circuit.contractions[place].rows for place in self._plain.values()]
        self._heights = [self.kernels[name].shape[0] for name in self._plain]
        self._outputs = [rows * height for rows, height in zip(self._rows, self._heights, strict=True)]
        self._inputs = [
            rows * self.kernels[name].shape[1] for name, rows in zip(self._plain, self._rows, strict=True)
        ]
        self._soft: dict[str, Tensor] = {}
        # What directions are the product of, of all plain layers one after another, and its parts by name.
        self._all_slopes, self._slopes = self._apart(self._outputs)
        self._all_x, self._x = self._apart(self._inputs)
        self._all_nodes = torch.empty(sum(self._heights), device=self.device)
        columns = torch.split(self._all_nodes.unsqueeze(1), self._heights)
        self._nodes = dict(zip(self._plain, columns, strict=True))
        self._is_by_node = bool(self.mixture.weights[1] and self.mixture.weights[2])
        # Layers whose kept units are listed, and what their directions are less there than elsewhere.
        self.lists: dict[str, Kept] = {}
        self._places: dict[str, Tensor] = {}
        self._less: dict[str, Tensor] = {}

    def _is_plain(self, name: str) -> bool:
        if len(self.uses[name]) != 1 or not self.whole[name] or self.kernels[name].transposed:
            return False
        op = self.circuit.contractions[self.uses[name][0]]
        return op.groups == 1 and op.is_whole

    def _apart(self, sizes: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Room for so many numbers per plain layer; the room of each, rows x channels where rows differ."""
        whole = torch.empty(sum(sizes), device=self.device)
        parts = zip(self._plain, self._rows, torch.split(whole, list(sizes)), strict=True)
        return whole, {name: part if rows == 1 else part.view(rows, -1) for name, rows, part in parts}

    def _dense(self, name: str) -> Tensor:
        return self.circuit.dense(name).to(self.device)

    def _counted(self, name: str, kept: Tensor) -> Tensor:
        """Kept live weights of every kernel, from those of every weight."""
        own = self.circuit.kernels[name]
        taps = kept.to(self.device, self.dtype).view(*own.shape[:2], -1)
        return (taps * self._live[name].to(self.dtype)).sum(2)

    # -- blocks ---------------------------------------------------------------------------------------------
    def attach(self, fields: list[Field]) -> None:
        self.fields = fields
        self._listed = {next(iter(field.where)): field for field in fields if field.kept is not None}
        self.given = {
            name: field.counts[where]
            for field in fields
            for name, where in field.where.items()
            if name not in self._listed
        }
        for name, kept in self.given.items():
            if self.whole[name]:
                self.counts[name] = kept.view(self.kernels[name].shape[:2])
        parts = [self._parted(field) for field in fields]
        most = max(part.stop - part.start for field in parts for part, _ in field)
        self._buffer = torch.empty(most, device=self.device)
        self._factor = torch.empty(most, device=self.device)
        self._blocks = [[self._block(part, pieces) for part, pieces in field] for field in parts]

    def _parted(self, field: Field) -> list[tuple[slice, list[tuple[str, slice]]]]:
        """The field in blocks of about so many units, cut between output channels."""
        cuts: list[tuple[slice, list[tuple[str, slice]]]] = []
        for name, where in field.where.items():
            height = self.kernels[name].shape[0]
            row = (where.stop - where.start) // height
            step = max(1, self.size // row) if name in self._plain else height
            for first in range(0, height, step):
                rows = slice(first, min(height, first + step))
                start, stop = where.start + rows.start * row, where.start + rows.stop * row
                if cuts and stop - cuts[-1][0].start <= self.size:
                    part, pieces = cuts.pop()
                    cuts.append((slice(part.start, stop), [*pieces, (name, rows)]))
                else:
                    cuts.append((slice(start, stop), [(name, rows)]))
        return cuts

    def _block(self, part: slice, pieces: list[tuple[str, slice]]) -> _Block:
        found, start = [], 0
        for name, rows in pieces:
            row = self.kernels[name].shape.numel() // (self.kernels[name].shape[0] * self.widths[name])
            size = (rows.stop - rows.start) * row
            shape = (-1, row) if name in self._plain else (-1,)
            views = [buffer[start : start + size].view(shape) for buffer in (self._buffer, self._factor)]
            if name in self._plain:
                views += [self._slopes[name][..., rows], self._x[name], self._nodes[name][rows]]
            found.append(_Piece(name, rows, *views))
            start += size
        return _Block(part, found)

    def blocks(self, field: int) -> list[slice]:
        return [block.part for block in self._blocks[field]]

    # -- reading --------------------------------------------------------------------------------------------
    def climb(self) -> float:
        self.recount()
        self.found = self.circuit.run(self._edges)
        self._soft = {}
        if self.found.log_total == -math.inf:
            self._climb_softly()
        else:
            self.prepare(self.found)
        return self.found.log_total

    def climb_ahead(self) -> None:
        """The same without waiting for the device: directions are zero where there is no path."""
        self.recount()
        self._soft = {}
        self.prepare(self.circuit.run_ahead(self._edges))

    @property
    def _edges(self) -> dict[str, Tensor | Kept]:
        return {**self.counts, **self.lists}

    def recount(self) -> None:
        """Counts of kernels whose weights are units of their own, and of those that are listed."""
        for name, field in self._listed.items():
            assert field.kept is not None
            if name not in self._places or self._places[name] is not field.kept:
                self._places[name] = field.kept
                height, width = self.kernels[name].shape[:2]
                out = torch.div(field.kept, width, rounding_mode="floor")
                self.lists[name] = Kept(out, field.kept - out * width, (height, width))
        for name, kept in self.given.items():
            if not self.whole[name]:
                self.counts[name] = self._counted(name, kept)

    def _climb_softly(self) -> None:
        """Towards a first path: whatever has a share in the paths that lack the fewest weights rises."""
        self._soft = {}
        for name in self.kernels:
            dense = self._dense(name)
            if name in self.lists:
                self._soft[name] = dense * SOFT
                self._soft[name][self.lists[name].out, self.lists[name].into] = 1.0
            else:
                self._soft[name] = self.counts[name] + SOFT * (dense - self.counts[name])
        self._ready = self.circuit.run(self.counts | self._soft)
        if self._plain:
            self._split(self._flat(self._ready.slope), self._ready.x)

    def prepare(self, found: Pass) -> None:
        """Makes ready what directions are the product of."""
        self._ready = found
        if not self._plain:
            return
        for_paths, for_nodes, for_kernels = self.mixture.weights
        slopes = self._flat(found.slope)
        self._split(slopes, found.x)
        if for_nodes:
            is_passed = self._per_node((self._flat(found.y) > 0) & (slopes > 0))
            torch.logical_not(is_passed, out=self._all_nodes).mul_(for_nodes).add_(for_paths)
            if not for_kernels:
                self._scale_by_node()
        elif not for_kernels and for_paths != 1:
            self._all_slopes.mul_(for_paths)
        if for_kernels:
            self._prepare_lists()

    def _scale_by_node(self) -> None:
        if max(self._rows) == 1:
            self._all_slopes.mul_(self._all_nodes)
            return
        for name, slope in self._slopes.items():
            slope.mul_(self._nodes[name].squeeze(1))

    def _prepare_lists(self) -> None:
        """Where few units are kept, slopes take the factor of all others; the few have theirs put right."""
        for_paths, _, for_kernels = self.mixture.weights
        for name in self.lists:
            node = self._nodes[name].squeeze(1) if self._is_by_node else torch.tensor(for_paths)
            self._slopes[name].mul_(node + for_kernels)
            self._less[name] = (node / (node + for_kernels)).expand(self.kernels[name].shape[0])

    def _flat(self, values: Sequence[Tensor]) -> Tensor:
        """Those of plain layers, one after another."""
        return torch.cat([values[place] for place in self._plain.values()])

    def _per_node(self, passed: Tensor) -> Tensor:
        """Whether any row of each output channel is marked, flat, from all rows."""
        if max(self._rows) == 1:
            return passed
        parts = zip(torch.split(passed, self._outputs), self._rows, strict=True)
        return torch.cat([part.view(rows, -1).any(0) for part, rows in parts])

    def _split(self, slopes: Tensor, arriving: Sequence[Tensor]) -> None:
        """Takes slopes and arriving paths of plain layers, to be seen by name in float32."""
        self._all_slopes.copy_(slopes)
        self._all_x.copy_(self._flat(arriving))

    def direction(self, field: int, block: int) -> Tensor:
        part, pieces = self._blocks[field][block]
        size = part.stop - part.start
        out, factor = self._buffer[:size], self._factor[:size]
        for_paths, _, for_kernels = self.mixture.weights
        if self.fields[field].kept is not None:
            for piece in pieces:
                self._product(piece)
                if for_kernels and not self._soft:
                    self._correct(piece.name, part, out)
            return out
        is_factored = bool(for_kernels) and not self._soft
        if is_factored:
            # A kernel that is kept and on no path has no derivative: whether it is empty says enough.
            torch.eq(self.fields[field].counts[part], 0, out=factor).mul_(for_kernels)
            if not self._is_by_node:
                factor.add_(for_paths)
        for piece in pieces:
            if piece.node is None:
                self._whole_layer(piece)
                if is_factored:
                    piece.factor.fill_(1.0)
                continue
            self._product(piece)
            if is_factored and self._is_by_node:
                piece.factor.add_(piece.node)
        return out.mul_(factor) if is_factored else out

    def is_moderate(self, field: int) -> bool:
        if self.fields[field].kept is None or self._soft:
            return False  # a look at small layers costs no less than what it may save
        (name,) = self.fields[field].where
        (least, most), (least_x, most_x) = _range(self._slopes[name]), _range(self._x[name])
        return least * least_x > SMALLEST and most * most_x * self._x[name].numel() < LARGEST

    def _correct(self, name: str, part: slice, out: Tensor) -> None:
        """Of the kept units in ``part`` of a listed layer, none opens a kernel."""
        places = self._places[name].numpy()
        first, last = np.searchsorted(places, (part.start, part.stop))
        own = places[first:last] - part.start
        out.numpy()[own] *= self._less[name].numpy()[self.lists[name].out.numpy()[first:last]]

    def _product(self, piece: _Piece) -> None:
        slope, x = piece.slope, piece.x
        assert slope is not None, "only plain layers are products"
        assert x is not None, "a product has two sides"
        if x.dim() == 1:
            torch.outer(slope, x, out=piece.out)
        elif len(x) <= FEW:
            torch.outer(slope[0], x[0], out=piece.out)
            for row in range(1, len(x)):
                piece.out.addr_(slope[row], x[row])
        else:
            torch.mm(slope.t(), x, out=piece.out)
        if self._soft:
            piece.out.mul_(self._soft[piece.name][piece.rows])

    def _whole_layer(self, piece: _Piece) -> None:
        name, own = piece.name, self.kernels[piece.name]
        gradient = self._gradient(self._ready, name)
        if self._soft:
            gradient = gradient * self._soft[name].float()
        else:
            alive = (gradient > 0) & (self.counts[name] > 0)
            gradient = gradient * self.mixture.factor(alive, own)
        if self.whole[name]:
            piece.out.copy_(gradient.flatten())
        else:
            piece.out.copy_((gradient.unsqueeze(2) * self._live[name]).flatten())

    def _gradient(self, found: Pass, name: str) -> Tensor:
        """d ln R_P / d count, shaped as the kernels."""
        gradient = torch.zeros(self.kernels[name].shape[:2], device=self.device)
        for place in self.uses[name]:
            op = self.circuit.contractions[place]
            op.spread(found.slope[place].float(), found.x[place].float(), gradient, add=True)
        return gradient

    # -- figures --------------------------------------------------------------------------------------------
    def figures(self) -> Figures:
        if self.found.log_total == -math.inf:
            return Figures(-math.inf, 0, 0)
        marks = self.circuit.marks(self._edges)
        nodes, kernels = [], []
        for name, listed in self.lists.items():
            slope, x = self._by_row(marks, name)
            alive = (slope[:, listed.out] * x[:, listed.into]).amax(0) > 0
            nodes.append(torch.zeros(listed.shape[0]).index_fill_(0, listed.out[alive], 1.0).sum().long())
            kernels.append(alive.sum())
        pieces = (piece for field in self._blocks for block in field for piece in block.pieces)
        for name, rows, *_ in (piece for piece in pieces if piece.name not in self.lists):
            if name not in self._plain:
                alive = (self._gradient(marks, name) > 0) & (self.counts[name] > 0)
                nodes.append(count_nodes(self.kernels[name], alive))
            else:
                slope, x = self._by_row(marks, name)
                alive = torch.mm(slope[:, rows].t(), x) > 0
                alive &= self.counts[name][rows] > 0
                nodes.append(alive.any(1).sum())
            kernels.append(alive.sum())
        found = torch.stack([torch.stack(nodes).sum(), torch.stack(kernels).sum()]).tolist()
        return Figures(self.found.log_total, *found)

    def _by_row(self, found: Pass, name: str) -> tuple[Tensor, Tensor]:
        """Slopes and arriving paths of a plain layer, rows x channels."""
        place = self._plain[name]
        op = self.circuit.contractions[place]
        return op.by_row(found.slope[place]), op.by_row(found.x[place])


def _range(values: Tensor) -> tuple[float, float]:
    """A bound on the least of the values above zero (NaN for none) and the largest (float32, none below)."""
    found = values.numpy()
    least = (found.view(np.uint32) - np.uint32(1)).min()  # zero comes after all others
    return float(least.view(np.float32)), float(found.max())
