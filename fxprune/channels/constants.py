"""Tell which constants of a graph are zeros, which of them layers make, and which may lose entries."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.graph import ChannelGraph, ir

__all__ = ["POINTWISE", "Constants", "sums_up"]

POINTWISE = (ir.Affine, ir.Gate, ir.Map, ir.Norm, ir.Sum)
"""Ops that keep the channels of what they read."""


class Constants:
    """The constants of a graph, noted op by op in its order.

    ``made``: the indices of those that layers make of others, whose channels go with those that they meet;
    ``zeros``: of those that are zero. ``offsets``: by index of a value, how many functions that are not zero
    at zero and constants that no mask reaches are behind the layer that makes it. One keeps a channel from
    zero; two may make up for each other, as in ``exp(x) - 1``.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.made: set[int] = set()
        self.zeros: set[int] = set()
        self.offsets: dict[int, int] = {}
        used: set[int] = set()
        for op in reversed(graph.ops):
            if isinstance(op, ir.Sink) or op.output.index in used:
                used |= {value.index for value in op.inputs}
        self._used = used

    def are_followed(self, value: ir.Value) -> bool:
        """Whether a constant has the channels of what it is made of: one of layers, or one that no path
        meets, as the matrices of all experts of which the input picks some.
        """
        return value.index in self.made or value.index not in self._used

    def note(self, op: ir.AnyOp) -> None:
        """Note what an op gives: whether it is zero without weights, and if that is no value on a path."""
        if offsets := self._offsets(op):
            self.offsets[op.output.index] = min(offsets, 2)
        layer = isinstance(op, ir.Kernel) and op.weight.name is not None
        if not op.output.live and (layer or any(value.index in self.made for value in op.inputs)):
            self.made.add(op.output.index)
        elif self._is_zero(op):
            self.zeros.add(op.output.index)

    def _offsets(self, op: ir.AnyOp) -> int:
        before = sum(self.offsets.get(value.index, 0) for value in op.inputs)
        match op:
            case ir.Map():
                return before + op.floor
            case ir.Affine():
                return before + (op.bias and all(use.constant for use in op.params))
            case ir.Sum():
                return before
            case ir.Source() if not op.output.live:
                return int(op.pattern is None and all(use.constant for use in op.params))
            case ir.Gather() if len(op.inputs) == 1:
                return before
            case _:
                return 0

    def _is_zero(self, op: ir.AnyOp) -> bool:
        """Whether the output is a constant that is zero."""
        if isinstance(op, ir.Source):
            return op.pattern is not None and not op.output.live and not bool(op.pattern.any())
        if not all(value.index in self.zeros for value in op.inputs):
            return False
        if isinstance(op, ir.Gather):
            return not bool(op.move(*(torch.zeros(value.shape) for value in op.inputs)).any())
        return isinstance(op, ir.Pool)

    def may_be_cut(self, value: ir.Value) -> bool:
        """Whether entries of a constant can be left out: zeros, and parameters, moved or entry by entry."""
        op = self.graph.op_of(value)
        if value.live or op is None:
            return False
        if isinstance(op, ir.Gather) or (isinstance(op, POINTWISE) and not sums_up(op)):
            return all(self.may_be_cut(each) for each in op.inputs)
        return value.index in self.zeros or (isinstance(op, ir.Source) and bool(op.params))

    def zeros_along(self, value: ir.Value, axis: int) -> Tensor | None:
        """Mark the entries along an axis (bool) that are zeros beside others; None if there are none."""
        maker = self.graph.op_of(value)
        if not isinstance(maker, ir.Gather):
            return None
        parts = [torch.full(each.shape, float(each.index not in self.zeros)) for each in maker.inputs]
        zero = (maker.move(*parts) == 0).movedim(axis, 0).flatten(1).all(1)
        return zero if bool(zero.any()) else None


def sums_up(op: ir.AnyOp) -> bool:
    """Whether entries that are left out would change what others become."""
    return (isinstance(op, ir.Map) and bool(op.axes)) or (isinstance(op, ir.Norm) and op.groups > 1)
