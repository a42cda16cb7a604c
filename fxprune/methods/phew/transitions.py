"""Transitions: from the entries of an op's input to the entries of its output, for many walkers at once.

Entries are flat indices of reduced tensors. A walker that finds no way on is lost: its entry becomes ``-1``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxprune.paths.circuit.linear_maps import coefficients
from fxprune.paths.circuit.parts import SparseMatrix

__all__ = ["CoefficientTransition", "Draw", "Members", "RowSampler", "Transition", "transition_of"]

Draw = Callable[[int], Tensor]
"""``draw(n)``: n numbers from U(0, 1)."""


class Transition(Protocol):
    """The way from one live input of an op to its output, and back.

    ``ids`` are the numbers of the walks, one for each of ``entries``.
    """

    def forward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draw output entries for input ``entries``, and the weights passed (``-1`` for none)."""

    def backward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draw input entries for output ``entries``, and the weights passed (``-1`` for none)."""

    def reached_from(self, inputs: Tensor) -> Tensor:
        """Mark the outputs that can be reached from any of ``inputs`` (both bool)."""

    def leading_to(self, outputs: Tensor) -> Tensor:
        """Mark the inputs that lead to any of ``outputs`` (both bool)."""

    def restrict(self, inputs: Tensor, outputs: Tensor) -> None:
        """Leave only what leads from ``inputs`` to ``outputs`` (both bool)."""


class RowSampler:
    """Draws one item of a row, with probability proportional to its size, for many rows at once.

    ``rows`` (sorted, int64) and ``sizes`` (non-negative) describe the items; ``number`` is that of rows. The
    cumulative shares of all rows follow one another in one ascending array, so that a draw is a binary
    search.
    """

    def __init__(self, rows: Tensor, sizes: Tensor, number: int) -> None:
        sizes = sizes.double()
        totals = torch.zeros(number, dtype=torch.float64).index_add_(0, rows, sizes)
        before = torch.cat([totals.new_zeros(1), totals.cumsum(0)[:-1]])
        share = (sizes.cumsum(0) - before[rows]) / totals[rows].clamp(min=1e-300)
        self._cumulative = rows + share.clamp(0, 1)
        self._has_items = totals > 0
        self._items = len(rows)

    def draw(self, rows: Tensor, chance: Tensor) -> Tensor:
        """An item of each of ``rows``; ``-1`` where the row has none of positive size."""
        if not self._items:
            return torch.full_like(rows, -1)
        item = torch.searchsorted(self._cumulative, rows + chance, right=True).clamp(max=self._items - 1)
        return item.where(self._has_items[rows], -1)


class CoefficientTransition:
    """The transition of an op without weights: proportional to the op's own coefficients."""

    def __init__(self, entries: SparseMatrix, inputs: int, outputs: int) -> None:
        self.entries, self.inputs, self.outputs = entries, inputs, outputs
        self._index()

    def _index(self) -> None:
        target, source, sizes = self.entries
        by_source, by_target = source.argsort(stable=True), target.argsort(stable=True)
        self._targets, self._sources = target[by_source], source[by_target]
        self._forward = RowSampler(source[by_source], sizes[by_source], self.inputs)
        self._backward = RowSampler(target[by_target], sizes[by_target], self.outputs)

    def forward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        item = self._forward.draw(entries, draw(len(entries)))
        return _at(self._targets, item), torch.full_like(entries, -1)

    def backward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        item = self._backward.draw(entries, draw(len(entries)))
        return _at(self._sources, item), torch.full_like(entries, -1)

    def reached_from(self, inputs: Tensor) -> Tensor:
        found = torch.zeros(self.outputs, dtype=torch.bool)
        found[self.entries.out[inputs[self.entries.into]]] = True
        return found

    def leading_to(self, outputs: Tensor) -> Tensor:
        found = torch.zeros(self.inputs, dtype=torch.bool)
        found[self.entries.into[outputs[self.entries.out]]] = True
        return found

    def restrict(self, inputs: Tensor, outputs: Tensor) -> None:
        used = inputs[self.entries.into] & outputs[self.entries.out]
        if not bool(used.all()):
            self.entries = SparseMatrix(*(part[used] for part in self.entries))
            self._index()


def _at(values: Tensor, item: Tensor) -> Tensor:
    """``values[item]``, and ``-1`` where ``item`` is."""
    if not len(values):
        return item
    return values[item.clamp(min=0)].where(item >= 0, -1)


def transition_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> CoefficientTransition:
    """The transition of a linear function of a reduced tensor of ``shape``.

    Raises:
        ValueError: the function has too many coefficients to look at.
    """
    entries, outputs = coefficients(function, shape)
    return CoefficientTransition(entries, torch.Size(shape).numel(), outputs)


@dataclass(frozen=True)
class Members:
    """The entries of every class of one axis: those of class c are ``order[first[c] : first[c] + count[c]]``.

    ``index`` is the class of every entry.
    """

    index: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, index: Tensor, classes: int) -> Members:
        count = torch.bincount(index, minlength=classes)
        return cls(index, index.argsort(stable=True), count.cumsum(0) - count, count)

    def draw(self, classes: Tensor, chance: Tensor) -> Tensor:
        """A member of each class, each as likely."""
        return self.order[self.first[classes] + (chance * self.count[classes]).long()]
