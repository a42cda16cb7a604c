"""Find axes along which a value repeats one entry: what is there goes with whatever it meets.

A gate per row that code spreads over the channels by hand (``expand``, ``repeat``) is as wide as these, but
none of its entries is one of a channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxprune.channels.labels import Factor
from fxprune.graph import ChannelGraph, ir

__all__ = ["Repeats"]


class Repeats:
    """The axes, by value, of values on paths that one op reads, and nothing else."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._axes: dict[int, frozenset[int]] = {}
        self._readers: dict[int, int] = {}
        for op in graph.ops:
            for value in graph.in_both_modes(op):
                self._readers[value.index] = self._readers.get(value.index, 0) + 1

    def of(self, value: ir.Value) -> frozenset[int]:
        """Return the axes along which every entry of ``value`` is the same."""
        return self._axes.get(value.index, frozenset())

    def note(self, op: ir.Op, factors: Sequence[Factor]) -> None:
        """Find the axes of what an op gives, if that has no ``factors``."""
        if factors or not op.output.live or self._readers.get(op.output.index) != 1:
            return
        found = frozenset(self._found(op))
        if found:
            self._axes[op.output.index] = found

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a value, with size one where it repeats an entry."""
        axes = self.of(value)
        return tuple(1 if axis in axes else size for axis, size in enumerate(value.shape))

    def along(self, value: ir.Value, factors: Sequence[Factor], rank: int) -> list[Factor]:
        """Return the factors of a result of ``rank`` axes that lie along such axes of an operand."""
        more, found = rank - len(value.shape), []
        for factor in factors:
            own = tuple(axis - more for axis in factor.axes)
            if self.of(value).issuperset(own):
                found.append(Factor(own, factor.labels.reshape(factor.labels.shape[more:])))
        return found

    def _found(self, op: ir.Op) -> Iterator[int]:
        shape = op.output.shape
        match op:
            case ir.Gather():
                parts = op.index_map().parts
                if len(parts) == 1:
                    read = {axis for coordinate in parts[0].axes for axis, _ in coordinate.terms}
                    for axis, size in enumerate(shape):
                        if size > 1 and axis not in read and len(parts[0].positions[axis]) == size:
                            yield axis
            case ir.Sum() | ir.Gate() | ir.Map():
                sizes = [(1,) * (len(shape) - len(x.shape)) + self.shape(x) for x in op.inputs]
                summed = op.axes if isinstance(op, ir.Map) else ()
                for axis, size in enumerate(shape):
                    if size > 1 and axis not in summed and all(own[axis] == 1 for own in sizes):
                        yield axis
