"""Label the entries of every value with the channel that they belong to.

A *label* stands for one output or input channel of one parameter: a slice of it that can be removed. The
labels of a value are kept as *factors*: a factor covers some of the value's axes, and gives a label to every
index along them. A value of a token mixer has two, one along its tokens and one along its features; an entry
is there while the labels of all its factors are. Axes that no factor covers (batches, positions, the features
of the network's input) keep their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxprune.channels.components import joined

__all__ = [
    "FILLED", "FIRST", "FIXED", "Factor", "Heads", "Labels", "Lines", "Sides", "aligned", "along_axis",
    "distinct", "thin",
]  # fmt: skip

FILLED = 0
"""The label of entries that data movement fills in: they follow whatever they meet."""

FIXED = 1
"""The label of entries that cannot be removed."""

FIRST = 2
"""The first label of a channel."""


@dataclass(frozen=True, eq=False)
class Factor:
    """Labels along some axes of a value: ``labels`` (int64) has the value's rank, and size one elsewhere."""

    axes: tuple[int, ...]
    labels: Tensor

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Factor) and self.axes == other.axes and torch.equal(self.labels, other.labels)
        )

    def __hash__(self) -> int:
        return hash(self.axes)

    def shifted(self, by: int) -> Factor:
        """The factor of a value with ``by`` more axes in front."""
        if not by:
            return self
        return Factor(tuple(axis + by for axis in self.axes), self.labels[(None,) * by])


@dataclass(frozen=True, eq=False)
class Lines:
    """Labels that need equal numbers in every line along their last axis.

    Where one axis is viewed as several (heads and their features, the groups of a convolution), the result is
    a tensor only if every line keeps equally many; a line may also vanish as a whole, unless ``stay`` says
    that none may. ``value`` is the index of the value, -1 for lines of several. ``box``: what is left must be
    a product of indices along each axis, as of a parameter with an axis for heads and one for their channels.
    ``partner``: the labels of lines without which these cannot vanish, as the inputs of a group of a
    convolution with its outputs.
    """

    labels: Tensor
    value: int
    place: str
    stay: bool = False
    box: bool = False
    partner: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Heads:
    """Labels ``one`` (heads,) of attention heads: each goes with its channels, ``each`` (heads, channels).

    A head is no channel of any parameter. Its label says which entries of the scores, and of what is added to
    them, go where none of its channels is left.
    """

    one: Tensor
    each: Tensor
    place: str


@dataclass(frozen=True, eq=False)
class Sides:
    """The labels of one use of a parameter: ``rows`` (out,) and ``columns`` (in,), as its matrix has them."""

    op: int
    name: str | None
    rows: Tensor
    columns: Tensor


@dataclass
class Labels:
    """All labels of a graph, what ties them, and why some are fixed.

    ``rows``, ``columns``: parameter -> the label of its first output and its first input channel; the others
    follow. ``tables``: by parameter that is a table of vectors, such as an embedding, the labels of their
    entries. ``heads``: what the labels of attention heads stand for; ``first_heads``: the first and the
    number of those of each product. ``values``: value index -> its factors. ``reasons``: for labels that are
    fixed by themselves, the operation that fixes them.
    """

    count: int = FIRST
    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    values: dict[int, tuple[Factor, ...]] = field(default_factory=dict)
    sides: list[Sides] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    first_heads: list[tuple[int, int]] = field(default_factory=list)
    lines: list[Lines] = field(default_factory=list)
    edges: list[Tensor] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    # The groups by the first of the edges, and how many these are.
    _root: Tensor = field(default_factory=lambda: torch.arange(0))
    _joined: int = 0

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let the labels of two tensors (broadcast against each other) go together, entry by entry."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        differ = (a != b) & (a != FILLED) & (b != FILLED)
        if bool(differ.any()):
            # One number for each edge: to sort pairs takes ten times as long.
            codes = torch.unique(a[differ] * self.count + b[differ])
            self.edges.append(torch.stack([codes // self.count, codes % self.count]))

    def fix(self, labels: Tensor, reason: str) -> None:
        """Forbid the removal of ``labels``; the first reason given for each stays."""
        some = torch.unique(labels[labels >= FIRST])
        if some.numel():
            self.edges.append(torch.stack([some, torch.full_like(some, FIXED)]))
            for label in some.tolist():
                self.reasons.setdefault(label, reason)

    def of_table(self, name: str, size: int) -> Tensor:
        """Return the labels of the entries of a table's vectors, which are new at the first call."""
        if name not in self.tables:
            self.tables[name] = torch.arange(self.count, self.count + size)
            self.count += size
        return self.tables[name]

    def of_heads(self, count: int) -> Tensor:
        """Return new labels for the heads of a product."""
        self.first_heads.append((self.count, count))
        return self.more(count)

    def more(self, count: int) -> Tensor:
        """Return new labels."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def are_heads(self, labels: Tensor) -> bool:
        """Whether all labels are those of heads, as `of_heads` gives them."""
        low, high = int(labels.min()), int(labels.max())
        return any(first <= low and high < first + count for first, count in self.first_heads)

    @property
    def root(self) -> Tensor:
        """The group of every label: the smallest label that goes with it, ``FIXED`` for what cannot go."""
        known = self._root
        if len(known) < self.count:
            known = torch.cat([known, torch.arange(len(known), self.count)])
        if self._joined < len(self.edges):
            known = joined(known, torch.cat(self.edges[self._joined :], 1))
        self._root, self._joined = known, len(self.edges)
        return known


def aligned(factors: Sequence[Factor], rank: int, out_rank: int) -> list[Factor]:
    """The factors of a value of ``rank`` axes as they stand after broadcasting to ``out_rank`` axes."""
    return [factor.shifted(out_rank - rank) for factor in factors]


def along_axis(axis: int, labels: Tensor, rank: int) -> Factor:
    """The factor of a value of ``rank`` axes with ``labels`` along one of them."""
    return Factor((axis,), labels.reshape([-1 if place == axis else 1 for place in range(rank)]))


def thin(labels: Tensor) -> Factor | None:
    """The factor with these labels (of a value's full shape); ``None`` if one label is left, or none.

    Entries that were filled in (zeros around an image) do not tell indices apart. Lines of nothing else, as
    of a first token beside those of several tables, have the labels of another line.
    """
    axes = []
    for axis, size in enumerate(labels.shape):
        if size == 1 or not labels.numel():
            continue
        top = labels.amax(axis, keepdim=True)
        is_plain = (labels == top) | (labels == FILLED)
        if bool(is_plain.view(torch.uint8).amin()):  # bytes are many times faster than bits
            labels = top
        else:
            axes.append(axis)
    if len(axes) > 1:
        empty = (labels == FILLED).all(axes[-1], keepdim=True)
        if bool(empty.any()):
            lines = labels.movedim(axes[-1], -1).flatten(0, -2)
            first = lines[int((~empty).movedim(axes[-1], -1).flatten().long().argmax())]
            shape = [-1 if axis == axes[-1] else 1 for axis in range(labels.dim())]
            labels = labels.where(~empty, first.view(shape))
    return Factor(tuple(axes), labels) if axes else None


def distinct(factors: Sequence[Factor]) -> list[Factor]:
    """Drop factors whose axes include those of another: they are tied, and the narrower one tells all.

    Entries that one of two factors along the same axes fills in have the label of the other.
    """
    found: dict[tuple[int, ...], Factor] = {}
    for factor in sorted(factors, key=lambda factor: len(factor.axes)):
        if factor.axes in found:
            known = found[factor.axes].labels
            found[factor.axes] = Factor(factor.axes, factor.labels.where(known == FILLED, known))
        elif not any(set(axes) <= set(factor.axes) for axes in found):
            found[factor.axes] = factor
    return list(found.values())
