"""Count what a network costs when some of its channel groups are gone: weights, parameters, multiply-adds.

A cost is a sum of terms; a term is a product of numbers of entries, and an entry is there while the group of
its row and the group of its column are. So a cost is exact for every choice of groups, and so is what the
removal of one more group saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from fxprune.channels.by_channel import any_by_channel
from fxprune.channels.counts import dense_macs
from fxprune.channels.entries import entry_groups
from fxprune.channels.groups import Groups
from fxprune.channels.labels import Factor
from fxprune.graph import ir

__all__ = [
    "Block",
    "Cost",
    "CostModel",
    "Entries",
    "Matrix",
    "Term",
    "count_macs",
    "count_parameters",
    "count_weights",
]


@dataclass(frozen=True, eq=False)
class Matrix:
    """``counts`` (R, C): the number of entries at each row and column, of groups ``rows`` and ``columns``.

    Groups are numbered from 0; the number after the last group stands for what cannot go.
    """

    rows: Tensor
    columns: Tensor
    counts: Tensor

    def left(self, stays: Tensor) -> float:
        """Count the entries that are left; ``stays`` (groups + 1,) is 1.0 for what stays, else 0.0."""
        return float(stays[self.rows] @ self.counts @ stays[self.columns])

    def saved(self, stays: Tensor) -> Tensor:
        """Count the entries that are left and go with each group (groups + 1,)."""
        rows, columns = stays[self.rows], stays[self.columns]
        saved = torch.zeros_like(stays)
        saved.index_add_(0, self.rows, rows * (self.counts @ columns))
        saved.index_add_(0, self.columns, columns * (rows @ self.counts))
        groups, counts = self._once
        saved.index_add_(0, groups, -counts * stays[groups])
        return saved

    @cached_property
    def total(self) -> float:
        """Count all entries."""
        return float(self.counts.sum())

    @cached_property
    def _once(self) -> tuple[Tensor, Tensor]:
        """The entries whose row and column are of one group, which go once."""
        row, column = (self.rows[:, None] == self.columns).nonzero(as_tuple=True)
        return self.rows[row], self.counts[row, column]


@dataclass(frozen=True, eq=False)
class Block:
    """``each`` entries at every row and column, of groups ``rows`` (R,) and ``columns`` (C,)."""

    rows: Tensor
    columns: Tensor
    each: float

    def left(self, stays: Tensor) -> float:
        """Count the entries that are left, as `Matrix.left` does."""
        return self.each * float(stays[self.rows].sum()) * float(stays[self.columns].sum())

    def saved(self, stays: Tensor) -> Tensor:
        """Count the entries that go with each group, as `Matrix.saved` does."""
        rows, columns = (self._numbers(side, stays) for side in (self.rows, self.columns))
        return self.each * (rows * columns.sum() + columns * rows.sum() - rows * columns)

    @cached_property
    def total(self) -> float:
        """Count all entries."""
        return self.each * len(self.rows) * len(self.columns)

    @staticmethod
    def _numbers(side: Tensor, stays: Tensor) -> Tensor:
        """The number of channels that are left of each group."""
        return torch.zeros_like(stays).index_add_(0, side, stays[side])


@dataclass(frozen=True, eq=False)
class Entries:
    """``counts`` (E,) entries each, of groups ``rows`` (E,) and ``columns`` (E,), where no matrix fits."""

    rows: Tensor
    columns: Tensor
    counts: Tensor

    def left(self, stays: Tensor) -> float:
        """Count the entries that are left, as `Matrix.left` does."""
        return float((stays[self.rows] * stays[self.columns] * self.counts).sum())

    def saved(self, stays: Tensor) -> Tensor:
        """Count the entries that go with each group, as `Matrix.saved` does."""
        left = stays[self.rows] * stays[self.columns] * self.counts
        saved = torch.zeros_like(stays)
        saved.index_add_(0, self.rows, left)
        saved.index_add_(0, self.columns, left.where(self.rows != self.columns, 0.0))
        return saved

    @cached_property
    def total(self) -> float:
        """Count all entries."""
        return float(self.counts.sum())


Part = Block | Matrix | Entries


@dataclass(frozen=True, eq=False)
class Term:
    """``unit`` times the product of the numbers of entries of all ``parts``."""

    unit: float
    parts: tuple[Part, ...]

    def left(self, stays: Tensor) -> float:
        """The cost of this term while the groups marked in ``stays`` do."""
        return self.unit * prod(part.left(stays) for part in self.parts)

    def saved(self, stays: Tensor) -> Tensor:
        """Return what the removal of each group alone takes from this term.

        Exact where a group is in one part; where it is in several, the sum of what it takes in each.
        """
        counts = [part.left(stays) for part in self.parts]
        saved = torch.zeros_like(stays)
        for place, part in enumerate(self.parts):
            others = prod(counts[:place] + counts[place + 1 :])
            saved += self.unit * others * part.saved(stays)
        return saved


class CostModel(Protocol):
    """Describe what a choice of groups asks of a cost."""

    def left(self, staying: Tensor) -> float:
        """The cost of the network in which only the groups marked in ``staying`` (bool) are left."""

    def towards(self, staying: Tensor, level: float) -> Tensor:
        """Return what each group takes from the cost while it is above ``level`` (float64)."""

    @property
    def whole(self) -> float:
        """The cost of the whole network."""


@dataclass(frozen=True, eq=False)
class Cost:
    """Hold what a network costs: ``fixed``, whatever goes, and the ``terms``; ``groups`` is their number."""

    groups: int
    fixed: float
    terms: tuple[Term, ...]

    def left(self, staying: Tensor) -> float:
        """Return the cost of the network in which only the groups marked in ``staying`` (bool) are left."""
        stays = self._extended(staying)
        blocks = iter(self._left_of_blocks(stays))
        return self.fixed + sum(
            term.unit
            * prod(next(blocks) if isinstance(part, Block) else part.left(stays) for part in term.parts)
            for term in self.terms
        )

    def _left_of_blocks(self, stays: Tensor) -> list[float]:
        """Count the entries that are left of every block: all at once, for most costs have nothing else."""
        sides, place, each = self._blocks
        sums = stays.new_zeros(2 * len(each)).index_add_(0, place, stays[sides])
        left: list[float] = (each * sums[::2] * sums[1::2]).tolist()
        return left

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sides of all blocks in a row, the place of each entry's side, and the numbers ``each``."""
        blocks = [part for term in self.terms for part in term.parts if isinstance(part, Block)]
        sides = [side for block in blocks for side in (block.rows, block.columns)]
        place = torch.arange(len(sides)).repeat_interleave(
            torch.tensor([len(side) for side in sides], dtype=torch.int64)
        )
        each = torch.tensor([block.each for block in blocks], dtype=torch.float64)
        return torch.cat([place[:0], *sides]), place, each

    def saved(self, staying: Tensor) -> Tensor:
        """Return what the removal of each group that is left would save (float64, one for every group)."""
        stays = self._extended(staying)
        saved = torch.zeros_like(stays)
        for term in self.terms:
            saved += term.saved(stays)
        return saved[: self.groups]

    def towards(self, staying: Tensor, level: float) -> Tensor:
        """Return what each group takes from the cost on its way down to ``level``: what it saves."""
        return self.saved(staying)

    @cached_property
    def whole(self) -> float:
        """The cost of the whole network."""
        return self.left(torch.ones(self.groups, dtype=torch.bool))

    @staticmethod
    def _extended(staying: Tensor) -> Tensor:
        return torch.cat([staying, staying.new_ones(1)]).double()


def count_weights(groups: Groups, masks: Mapping[str, Tensor]) -> Cost:
    """Return the cost that is the number of weights that ``masks`` keep."""
    terms = []
    for name, mask in masks.items():
        terms.append(Term(1.0, (_weights(groups, name, mask),)))
    return Cost(groups.count, 0.0, tuple(terms))


def count_parameters(groups: Groups, shapes: Mapping[str, Sequence[int]]) -> Cost:
    """Return the cost that is the number of entries of all parameters, of the given ``shapes`` by name.

    A parameter that no operation reads by axis, such as a table that is only looked up, keeps its size.
    """
    terms, seen = [], set()
    for name, kernels in groups.graph.kernels.items():
        if name in shapes:
            mask = torch.ones((), dtype=torch.bool).expand(kernels.shape)
            terms.append(Term(1.0, (_weights(groups, name, mask),)))
            seen.add(name)
    for name, by_axis in entry_groups(groups, shapes).items():
        if name not in seen:
            rest = prod(size for axis, size in enumerate(shapes[name]) if axis not in by_axis)
            parts = tuple(
                _line(_numbered(numbers, groups.count), groups.count) for numbers in by_axis.values()
            )
            terms.append(Term(float(rest), parts))
            seen.add(name)
    fixed = sum(prod(shape) for name, shape in shapes.items() if name not in seen)
    return Cost(groups.count, float(fixed), tuple(terms))


def count_macs(groups: Groups) -> Cost:
    """Return the cost that is the number of multiply-adds for one sample.

    Those of convolutions and linear maps, and of products of two values, such as attention: those of the
    dense network are `dense_macs` of every op. A product that no equation describes keeps its own.
    """
    by_label = _numbered(groups.numbers, groups.count)
    sides = {side.op: side for side in groups.labels.sides}
    fixed, terms = 0.0, list[Term]()
    for number, op in enumerate(groups.graph.ops):
        match op:
            case ir.Kernel():
                side = sides[number]
                rows, columns = by_label[side.rows], by_label[side.columns]
                part = _matrix(rows, columns, op.groups)
                parts: tuple[Part, ...] = (part, *_other_channels(groups, by_label, op))
            case ir.Mix():
                parts = _product(groups, by_label, op) if op.equation else ()
            case _:
                continue
        dense = dense_macs(op, groups.graph.samples)
        if parts:
            terms.append(Term(dense / prod(part.total for part in parts), parts))
        else:
            fixed += dense
    return Cost(groups.count, fixed, tuple(terms))


# -- entries of parameters ----------------------------------------------------------------------------------
def _numbered(numbers: Tensor, count: int) -> Tensor:
    return numbers.where(numbers >= 0, count)


def _weights(groups: Groups, name: str, mask: Tensor) -> Part:
    """The weights of a parameter that a mask keeps: a block, if these are all of some rows and columns."""
    kernels = groups.graph.kernels[name]
    each = mask.numel() // (kernels.outputs * kernels.inputs // kernels.groups)
    tables = (groups.rows[name], groups.columns[name])
    if kernels.groups == 1:
        if mask.numel() and bool(mask.view(torch.uint8).amin()):  # many times faster than `all`
            rows, columns = (_numbered(table, groups.count) for table in tables)
            return Block(rows, columns, float(each))
        sides = any_by_channel(mask, kernels)
        if int(mask.count_nonzero()) == each * int(sides[0].sum()) * int(sides[1].sum()):
            rows, columns = (
                _numbered(table[side], groups.count) for table, side in zip(tables, sides, strict=True)
            )
            return Block(rows, columns, float(each))
    marks = kernels.by_axes(mask)
    counts = (marks.flatten(2).sum(2) if marks.dim() > 2 else marks).cpu().double()
    if kernels.groups == 1:
        rows, columns = (_numbered(table, groups.count) for table in tables)
        return Matrix(rows, columns, counts.T if kernels.transposed else counts)
    by_row, by_column = (numbers.reshape(counts.shape) for numbers in groups.by_weight(name))
    by_row, by_column = (_numbered(numbers, groups.count).flatten() for numbers in (by_row, by_column))
    return Entries(by_row, by_column, counts.flatten())


def _matrix(rows: Tensor, columns: Tensor, parts: int) -> Block | Entries:
    """The entries of a matrix (out, in / parts) whose rows read one part of the columns each."""
    if parts == 1:
        return Block(rows, columns, 1.0)
    by_column = columns.view(parts, 1, -1).expand(parts, len(rows) // parts, -1).reshape(len(rows), -1)
    by_row = rows[:, None].expand(by_column.shape)
    return Entries(by_row.flatten(), by_column.flatten(), torch.ones(by_row.numel(), dtype=torch.float64))


def _line(numbers: Tensor, count: int) -> Entries:
    numbers = numbers.flatten()
    return Entries(numbers, torch.full_like(numbers, count), torch.ones(len(numbers), dtype=torch.float64))


# -- multiply-adds ------------------------------------------------------------------------------------------
def _other_channels(groups: Groups, by_label: Tensor, op: ir.Kernel) -> Iterator[Entries]:
    """The channels along other axes than the one that a layer contracts."""
    axis = len(op.output.shape) - 1 - (0 if op.window is None else len(op.window.kernel))
    for factor in groups.labels.values.get(op.output.index, ()):
        if axis not in factor.axes:
            yield _line(by_label[factor.labels], groups.count)


def _product(groups: Groups, by_label: Tensor, op: ir.Mix) -> tuple[Entries, ...]:
    """The entries that ``einsum(equation, a, b)`` multiplies, as far as channels decide on them."""
    inputs, _, _ = op.equation.partition("->")
    letters = inputs.split(",")
    sizes: dict[str, int] = {}
    found: list[tuple[str, Tensor]] = []
    for own, value in zip(letters, op.inputs, strict=True):
        sizes |= {
            letter: size for letter, size in zip(own, value.shape, strict=True) if sizes.get(letter, 1) == 1
        }
        for factor in groups.labels.values.get(value.index, ()):
            found.append(_by_letters(own, factor, by_label))
    parts, used = [], set[str]()
    for names, numbers in _widest(found):
        if used & set(names):
            continue
        partner = next(
            (other for other in found if set(other[0]) & set(names) and not set(other[0]) <= set(names)), None
        )
        joint = names + "".join(letter for letter in (partner[0] if partner else "") if letter not in names)
        by_row = _spread(names, numbers, joint, sizes)
        by_column = _spread(*partner, joint, sizes) if partner else torch.full_like(by_row, groups.count)
        ones = torch.ones(by_row.numel(), dtype=torch.float64)
        parts.append(Entries(by_row.flatten(), by_column.flatten(), ones))
        used |= set(joint)
    return tuple(parts)


def _by_letters(own: str, factor: Factor, by_label: Tensor) -> tuple[str, Tensor]:
    names = "".join(own[axis] for axis in factor.axes)
    return names, by_label[factor.labels].reshape([factor.labels.shape[axis] for axis in factor.axes])


def _widest(found: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The factors with the most letters first: a factor over fewer of the same letters adds nothing."""
    yield from sorted(found, key=lambda factor: -len(factor[0]))


def _spread(names: str, numbers: Tensor, joint: str, sizes: Mapping[str, int]) -> Tensor:
    """Groups by the letters ``names``, repeated along the other letters of ``joint``."""
    order = [letter for letter in joint if letter in names]
    numbers = numbers.permute([names.index(letter) for letter in order])
    for place, letter in enumerate(joint):
        if letter not in names:
            numbers = numbers.unsqueeze(place)
    return numbers.expand([sizes[letter] for letter in joint])
