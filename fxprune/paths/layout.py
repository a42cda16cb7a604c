"""Describe which entries of a tensor are known to be equal, axis by axis, and store each of them once.

A *layout* has one :class:`AxisMap` per axis, which puts each of the ``size`` entries of the axis in one of
``count`` classes. Entries of a tensor are equal if their coordinates are in the same classes, so the tensor
is stored as its *reduced* tensor, of shape ``(count_0, count_1, ...)``. An axis with one class is *collapsed*
(a batch, or positions that are all alike), an axis with a class for each entry is *explicit* (channels), and
all others are *partitions* (class token and patches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "AxisMap",
    "Layout",
    "broadcast",
    "collapsed",
    "explicit",
    "full_labels",
    "join",
    "layout_of_labels",
    "reader",
    "reduced_shape",
]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """Put the entries of one axis in classes: ``labels[i]`` is the class of entry ``i``.

    ``labels`` is ``None`` for a collapsed axis (``count == 1``) and an explicit one (``count == size``).
    """

    size: int
    count: int
    labels: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AxisMap) or (self.size, self.count) != (other.size, other.count):
            return False
        if self.labels is None or other.labels is None:
            return self.labels is other.labels
        return torch.equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((self.size, self.count))

    @property
    def is_collapsed(self) -> bool:
        return self.count == 1

    @property
    def is_explicit(self) -> bool:
        return self.count == self.size

    def index(self) -> Tensor:
        """Return the class of every entry, an int64 tensor of length ``size``."""
        if self.labels is not None:
            return self.labels
        if self.is_collapsed:
            return torch.zeros(self.size, dtype=torch.int64)
        return torch.arange(self.size)

    def multiplicity(self) -> Tensor:
        """Count the entries of every class, an int64 tensor of length ``count``."""
        return torch.bincount(self.index(), minlength=self.count)

    def representatives(self) -> Tensor:
        """Return the first entry of every class, an int64 tensor of length ``count``."""
        first = torch.full((self.count,), self.size, dtype=torch.int64)
        return first.scatter_reduce(0, self.index(), torch.arange(self.size), "amin")


Layout = tuple[AxisMap, ...]


def collapsed(size: int) -> AxisMap:
    """Make an axis whose entries are all alike."""
    return AxisMap(size, 1)


def explicit(size: int) -> AxisMap:
    """Make an axis whose entries are all told apart."""
    return AxisMap(size, size)


def from_classes(classes: Tensor) -> AxisMap:
    """Make an axis from class numbers (any integers), and renumber classes in the order of first entries."""
    size = classes.numel()
    _, inverse = torch.unique(classes, return_inverse=True)
    count = int(inverse.max()) + 1 if size else 0
    if count in (1, size):
        return AxisMap(size, count)
    order = torch.argsort(AxisMap(size, count, inverse).representatives())
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count)
    return AxisMap(size, count, rank[inverse])


def join_axes(a: AxisMap, b: AxisMap) -> AxisMap:
    """Return the map with the fewest classes that tells apart what either of the two does."""
    if a.is_collapsed or b.is_explicit:
        return b
    if b.is_collapsed or a.is_explicit or a == b:
        return a
    return from_classes(a.index() * b.count + b.index())


def broadcast(layout: Layout, shape: Sequence[int]) -> Layout:
    """Broadcast a layout to ``shape``: axes that are new or repeated are collapsed."""
    missing = len(shape) - len(layout)
    padded = tuple(collapsed(1) for _ in range(missing)) + layout
    return tuple(
        axis if axis.size == size else collapsed(size) for axis, size in zip(padded, shape, strict=True)
    )


def join(layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Broadcast layouts to ``shape``; return the coarsest one that tells apart what any of them does."""
    result = tuple(collapsed(size) for size in shape)
    for layout in layouts:
        result = tuple(join_axes(a, b) for a, b in zip(result, broadcast(layout, shape), strict=True))
    return result


def reduced_shape(layout: Layout) -> tuple[int, ...]:
    """Return the shape of the reduced tensor."""
    return tuple(axis.count for axis in layout)


def full_labels(layout: Layout, offset: int = 0) -> Tensor:
    """Return a tensor of the full shape with the flat index of each entry in the reduced tensor.

    ``offset`` is added to every index.
    """
    shape = reduced_shape(layout)
    labels = torch.arange(offset, offset + int(torch.tensor(shape).prod()) if shape else offset + 1)
    labels = labels.reshape(shape)
    for dim, axis in enumerate(layout):
        if axis.is_collapsed:
            labels = labels.expand(*labels.shape[:dim], axis.size, *labels.shape[dim + 1 :])
        elif axis.labels is not None:
            labels = labels.index_select(dim, axis.labels)
    return labels


def layout_of_labels(labels: Tensor) -> tuple[Layout, Tensor]:
    """Find the coarsest layout of a tensor of integers, and return it with the reduced tensor.

    Two entries of an axis are of one class if their slices are equal. Slices are compared by a random linear
    hash modulo 2^64, so that the cost is one pass over ``labels`` per axis.
    """
    if labels.numel() == 0:  # nothing: one absent class stands for no entry at all
        return tuple(collapsed(size) for size in labels.shape), labels.new_zeros((1,) * labels.dim())
    axes: list[AxisMap] = []
    reduced = labels
    generator = torch.Generator().manual_seed(0x5EED)
    for dim in range(labels.dim()):
        size = reduced.shape[dim]
        if size == 1:
            axes.append(collapsed(1))
            continue
        rows = reduced.movedim(dim, 0).reshape(size, -1)
        if bool((rows == rows[:1]).view(torch.uint8).amin()):  # bytes are many times faster than bits
            axes.append(collapsed(size))
            reduced = reduced.narrow(dim, 0, 1)
            continue
        salt = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator)
        axis = from_classes((rows * salt).sum(1))
        axes.append(axis)
        if not axis.is_explicit:
            reduced = reduced.index_select(dim, axis.representatives())
    return tuple(axes), reduced.contiguous()


def reader(old: Layout, new: Layout) -> Callable[[Tensor], Tensor]:
    """Return the function that turns a reduced tensor of layout ``old`` into that of the finer ``new``.

    ``new`` may be of a shape that the old one is broadcast to.
    """
    padded = broadcast(old, [axis.size for axis in new])
    shape = (1,) * (len(new) - len(old)) + reduced_shape(old)
    repeats = [b.count if a.count == 1 != b.count else -1 for a, b in zip(padded, new, strict=True)]
    picks = [
        (dim, a.index()[b.representatives()])
        for dim, (a, b) in enumerate(zip(padded, new, strict=True))
        if a.count not in (1, b.count)
    ]
    is_repeated = any(repeat != -1 for repeat in repeats)

    def read(x: Tensor) -> Tensor:
        x = x.reshape(shape)
        for dim, index in picks:
            x = x.index_select(dim, index.to(x.device))
        return x.expand(repeats) if is_repeated else x

    return read
