"""Link the axes of values and parameters: which entries of one go with which entries of another.

A *place* is an axis: ``(value index, axis)`` of a value, or ``(name, axis)`` of a parameter or buffer. When
an entry of a place is removed, the entries that it is linked to have no meaning any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.graph.ops import (
    Affine,
    AnyOp,
    Gate,
    Gather,
    Kernel,
    Map,
    Mix,
    Norm,
    Opaque,
    Pool,
    Sink,
    Source,
    Sum,
    Value,
    refuse_kind,
)

__all__ = ["Link", "Place", "links_of"]

Place = tuple[int | str, int]


class Link(NamedTuple):
    """Entry ``entries[k]`` of ``place`` goes with entry ``partners[k]`` of ``other``.

    ``merged``: the axis of ``place`` is one of several that became one (a flatten). An entry of it has many
    partners then, and goes only when all of them do.
    """

    place: Place
    entries: Tensor
    other: Place
    partners: Tensor
    merged: bool = False


def links_of(ops: Sequence[AnyOp]) -> list[Link]:
    """Return the links of all ops, in the order of execution.

    Axes that two values of an op share are linked entry by entry, every axis of a parameter to the axis of
    the value that it runs along, and the axes of a data movement by its index map. Where a reshape cuts an
    axis into several (channels into heads), its entries are linked along the last of those that hold nothing
    else, so that every head loses the same. In a grouped layer all groups lose the same channels, and a
    filter for one input channel goes with it. What an op sums over, and an opaque op, has no links.
    """
    found: list[Link] = []
    for op in ops:
        found += _links_of_parameters(op)
        if isinstance(op, Gather):
            found += _links_of_movement(op)
            continue
        if isinstance(op, (Kernel, Norm)) and op.groups > 1:
            found += _links_of_groups(op)
        for value, axis, other, place in _shared_axes(op):
            if value.shape[axis] == other.shape[place] > 1:
                k = torch.arange(value.shape[axis])
                found.append(Link((value.index, axis), k, (other.index, place), k))
    return found


def _shared_axes(op: AnyOp) -> Iterator[tuple[Value, int, Value, int]]:
    """Yield an axis of one value and the axis of another that has the same entries."""
    out = op.output
    match op:
        case Sum() | Gate() | Affine() | Norm() | Map():  # broadcast from the last axis on
            for value in op.inputs:
                more = len(out.shape) - len(value.shape)
                yield from ((value, axis, out, axis + more) for axis in range(len(value.shape)))
        case Mix():  # einsum: axes of the same letter
            letters = op.equation.replace("->", ",").split(",") if op.equation else ()
            named = list(zip((*op.inputs, out), letters, strict=bool(letters)))
            for value, own in named:
                for other, others in named:
                    yield from ((value, own.index(c), other, others.index(c)) for c in own if c in others)
        case Pool():
            x = op.inputs[0]
            left = [axis for axis in range(len(x.shape)) if axis not in op.dims]
            yield from ((x, axis, out, axis if op.keepdim else place) for place, axis in enumerate(left))
        case Kernel():  # all axes before the channels, and those behind where positions stay apart
            channels, last = _channel_axis(op), len(out.shape)
            behind = op.window is not None and op.window.keeps_positions
            axes = [axis for axis in range(last if behind else channels) if axis != channels]
            yield from ((op.inputs[0], axis, out, axis) for axis in axes)
        case Source() | Opaque() | Sink() | Gather():
            return
        case _:
            refuse_kind(op)


def _channel_axis(op: Kernel | Norm) -> int:
    windows = len(op.window.kernel) if isinstance(op, Kernel) and op.window is not None else 0
    return 1 if isinstance(op, Norm) else len(op.output.shape) - 1 - windows


def _links_of_groups(op: Kernel | Norm) -> Iterator[Link]:
    axis, value, out = _channel_axis(op), op.inputs[0], op.output
    if isinstance(op, Kernel) and op.groups == value.shape[axis]:
        k = torch.arange(out.shape[axis])
        yield Link((value.index, axis), k // (len(k) // op.groups), (out.index, axis), k)
        return
    for one in (value, out):
        k = torch.arange(one.shape[axis])
        yield Link((one.index, axis), k, (one.index, axis), k % (len(k) // op.groups))


def _links_of_movement(op: Gather) -> Iterator[Link]:
    for part in op.index_map().parts:
        uses = Counter(axis for coordinate in part.axes for axis, _ in coordinate.terms)
        for axis, coordinate in enumerate(part.axes):
            if not coordinate.terms:
                continue
            own = [j for j, _ in coordinate.terms if uses[j] == 1] or [coordinate.terms[-1][0]]
            source, copy = torch.tensor(coordinate.start), torch.tensor(0)
            for j, numbers in coordinate.terms:
                source = source[..., None] + numbers
                copy = copy[..., None] + (part.positions[j] if j == own[-1] else torch.zeros_like(numbers))
            place, other = (op.inputs[part.input].index, axis), (op.output.index, own[-1])
            yield Link(place, source.flatten(), other, copy.flatten(), uses[own[-1]] > 1)


def _links_of_parameters(op: AnyOp) -> Iterator[Link]:
    shapes = {value.index: value.shape for value in (*op.inputs, op.output)}
    for use in op.params:
        for axis, along in enumerate(use.axes):
            if along is not None:
                sizes = torch.Size(shapes[along.value][one] for one in along.axes)
                k = torch.arange(sizes.numel())
                index = k if along.index is None else torch.tensor(along.index)
                k, index = k[index >= 0], index[index >= 0]
                yield Link((along.value, along.axes[-1]), k % sizes[-1], (use.name, axis), index)
