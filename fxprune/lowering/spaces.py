"""Keep track of the values whose entries along one axis are the output channels of one layer, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxprune.graph import ir

__all__ = ["Spaces", "space_name"]


def space_name(parameter: str) -> str:
    """Name the output channels of a parameter: after its module where it is the module's ``weight``.

    >>> space_name("stem.weight"), space_name("attention.q_proj_weight"), space_name("weight")
    ('stem', 'attention.q_proj_weight', 'weight')
    """
    path, _, leaf = parameter.rpartition(".")
    return path if path and leaf == "weight" else parameter


@dataclass
class Spaces:
    """By index of a value, the name of a layer's channel space and the axis that it lies along.

    Where several layers meet, or a layer's channels are moved about, the channels are those of the value
    alone, whose name is ``%`` and its index.
    """

    found: dict[int, tuple[str, int]] = field(default_factory=dict)

    def begin(self, value: ir.Value, name: str, axis: int) -> None:
        """Note that ``value`` is made by the layer ``name``, with its channels along ``axis``."""
        self.found[value.index] = name, axis

    def name_of(self, value: ir.Value, axis: int) -> str:
        """Name the channels along an axis of ``value``."""
        name, own = self.found.get(value.index, ("", -1))
        return name if own == axis else f"%{value.index}"

    def follow(self, op: ir.AnyOp) -> None:
        """Note the channels of the output where they are those of the inputs."""
        live = [value for value in op.inputs if value.live]
        known = self.found.get(live[0].index) if live else None
        if known is None or any(self.found.get(value.index) != known for value in live):
            return
        name, axis = known
        match op:
            case ir.Map() | ir.Norm() | ir.Affine() | ir.Sum() | ir.Gate():
                place = axis if all(value.shape == op.output.shape for value in live) else None
            case ir.Pool():
                gone = 0 if op.keepdim else sum(dim < axis for dim in op.dims)
                place = None if axis in op.dims else axis - gone
            case ir.Gather():
                place = _moved(op, axis) if len(op.inputs) == 1 else None
            case ir.Source() | ir.Kernel() | ir.Mix() | ir.Opaque() | ir.Sink():
                place = None
            case _:
                ir.refuse_kind(op)
        if place is not None:
            self.found[op.output.index] = name, place


def _moved(op: ir.Gather, axis: int) -> int | None:
    """The axis of the output that an axis of the input has become, with all its entries in order."""
    count = op.inputs[0].shape[axis]
    entries = torch.arange(1.0, count + 1)
    moved: Tensor = op.move(_along(axis, entries, op.inputs[0].shape))
    for place, size in enumerate(moved.shape):
        if moved.stride(place) == 0 and size > 0:  # one entry, repeated: nothing to compare
            moved = moved.narrow(place, 0, 1)
    for place, size in enumerate(moved.shape):
        if size == count and torch.equal(moved, _along(place, entries, moved.shape)):
            return place
    return None


def _along(axis: int, entries: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape with ``entries`` along an axis."""
    return entries.view([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
