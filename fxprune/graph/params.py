"""Parameters by axis: along which axis of which value every axis of a parameter or buffer runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["AxisUse", "ParamUse", "axes_of_labels", "axes_of_whole"]


@dataclass(frozen=True)
class AxisUse:
    """An axis of a parameter, as it meets a value.

    The axis runs along ``axes`` of the value with index ``value``. Entry ``j`` of these axes (flattened, if
    there are several) uses entry ``index[j]`` of the parameter's axis, ``-1`` for none; ``index`` is ``None``
    where entry ``j`` uses entry ``j``.
    """

    value: int
    axes: tuple[int, ...]
    index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ParamUse:
    """One parameter or buffer that an op reads, with one entry of ``axes`` per axis of the tensor.

    ``None`` stands for an axis that runs along no axis of a value: the taps of a convolution, an axis of size
    one, or one that other operations have mixed. ``groups`` is that of a grouped convolution. ``constant``:
    it is a buffer, which no mask reaches.

    Example:
        >>> import torch, fxprune
        >>> graph = fxprune.lower(fxprune.capture(torch.nn.Linear(4, 8), torch.ones(2, 4)))
        >>> weight, bias = graph.ops[1].params
        >>> weight
        ParamUse(name='weight', axes=(AxisUse(value=1, axes=(1,), index=None), AxisUse(value=0, axes=(1,), \
index=None)), groups=1, constant=False)
    """

    name: str
    axes: tuple[AxisUse | None, ...]
    groups: int = 1
    constant: bool = False


Place = tuple[int, int]
"""A value's index and one of its axes."""


def axes_of_whole(
    shape: Sequence[int], places: Sequence[Place | None], sizes: Sequence[int] | None = None
) -> tuple[AxisUse | None, ...]:
    """Return the axes of a parameter that is an operand as it is.

    Args:
        shape: the parameter's.
        places: for every axis the axis of a value that it runs along, if any.
        sizes: the size of those axes, where the parameter is repeated along them (grouped convolutions).
    """
    found: list[AxisUse | None] = []
    for size, place, full in zip(shape, places, sizes or shape, strict=True):
        index = tuple(j % size for j in range(full)) if full != size else None
        found.append(None if place is None or size == 1 else AxisUse(place[0], (place[1],), index))
    return tuple(found)


def axes_of_labels(
    labels: Tensor, shape: Sequence[int], places: Sequence[Place | None]
) -> tuple[AxisUse | None, ...]:
    """Read off labelled entries along which axes of values the axes of a parameter run.

    Args:
        labels: of the operand's shape; for every entry one more than the flat index of the parameter's entry
            that is there, 0 for none.
        shape: the parameter's.
        places: for every axis of the operand the axis of a value that it runs along, if any.
    """
    found: list[AxisUse | None] = []
    step = 1
    for size in reversed(shape):
        entries = torch.where(labels > 0, (labels - 1) // step % size, -1)
        found.append(_along(entries, size, places) if size > 1 else None)
        step *= size
    return tuple(reversed(found))


def _along(entries: Tensor, size: int, places: Sequence[Place | None]) -> AxisUse | None:
    """The fewest axes whose coordinates tell the entry."""
    for dim in range(entries.dim()):
        first = entries.narrow(dim, 0, 1)
        if entries.shape[dim] > 1 and bool((entries == first).all()):
            entries = first  # tables over heads are large, and alike along most axes
    known = [dim for dim, place in enumerate(places) if place is not None and entries.shape[dim] > 1]
    low, high = entries.where(entries >= 0, size), entries
    candidates = [(dim,) for dim in known] + list(combinations(known, 2))
    for dims in candidates:
        chosen = [place for dim in dims if (place := places[dim]) is not None]
        others = [dim for dim in range(entries.dim()) if dim not in dims]
        top = high.amax(others) if others else high
        bottom = low.amin(others) if others else low
        tells = bool(((top == bottom) | (top < 0)).all()) and int(top.max()) > int(bottom.min())
        if not tells or len({value for value, _ in chosen}) > 1:
            continue
        index = tuple(top.flatten().tolist())
        is_whole = len(dims) == 1 and index == tuple(range(size))
        return AxisUse(chosen[0][0], tuple(axis for _, axis in chosen), None if is_whole else index)
    return None
