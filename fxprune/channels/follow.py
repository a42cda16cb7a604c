"""Follow the output channels of every parameter through a graph, and find what ties them.

One rule per kind of op says which labels its inputs must share and which its output has. Nothing is decided
here about which channels go: the result is the relation that channel groups and compaction both stand on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import NoneType

import torch
from torch import Tensor

from fxprune.channels.constants import POINTWISE, Constants, sums_up
from fxprune.channels.contractions import behind_product, contraction, zero_operands
from fxprune.channels.labels import (
    FILLED,
    FIXED,
    Factor,
    Labels,
    Lines,
    Sides,
    aligned,
    along_axis,
    distinct,
    thin,
)
from fxprune.channels.merging import merged, moved_labels
from fxprune.channels.pooling import pooled
from fxprune.channels.repeats import Repeats
from fxprune.channels.shared import tie_shared
from fxprune.channels.sides import (
    ask_for_boxes,
    column_of,
    keep_read_tables,
    sides_of,
    table_factors,
    tie_parts,
)
from fxprune.channels.units import tie_units
from fxprune.channels.wholes import Whole, settle
from fxprune.graph import ChannelGraph, ir

__all__ = ["follow"]


def follow(graph: ChannelGraph, *, fixed: Collection[str] = (), whole_heads: bool = False) -> Labels:
    """Return the labels of every value of ``graph`` and the ties between them.

    ``fixed``: parameters whose output channels must all stay. ``whole_heads``: let the channels of an
    attention head go together, instead of the same number of channels of every head.
    """
    return _Follower(graph, fixed, whole_heads).run()


class _Follower:
    def __init__(self, graph: ChannelGraph, fixed: Collection[str], whole_heads: bool) -> None:
        self.graph, self.fixed, self.whole_heads = graph, fixed, whole_heads
        self.labels = Labels()
        for name, kernels in graph.kernels.items():
            self.labels.rows[name] = self.labels.count
            self.labels.columns[name] = self.labels.count + kernels.outputs
            self.labels.count += kernels.outputs + kernels.inputs
            ask_for_boxes(self.labels, kernels)
            if name in fixed:
                first = self.labels.rows[name]
                self.labels.fix(torch.arange(first, first + kernels.outputs), f"{name} is excluded")
        self.place = ""
        self.constants, self.repeats = Constants(graph), Repeats(graph)
        self.wholes: list[Whole] = []
        self.looked_up: list[Tensor] = []  # the labels of what tables give
        self.read = {value.index for op in graph.ops for value in op.inputs}

    def run(self) -> Labels:
        for number, op in enumerate(self.graph.ops):
            self.place = op.layer or op.node
            self.number = number
            factors = self._step(op)
            self.constants.note(op)
            if op.output.live or (factors and self.constants.are_followed(op.output)):
                self.labels.values[op.output.index] = tuple(factors)
            self.repeats.note(op, factors)
        for value in self.graph.training_outputs:
            for factor in self._of(value):
                self.labels.fix(factor.labels, "an output of the network in training")
        for units in self.graph.units:
            tie_units(self.labels, units, self.graph.kernels)
        tie_shared(self.labels, self.graph)
        settle(self.labels, self.wholes)
        for index in self.constants.made - self.read:  # a bias of attention, say, which is on no path
            for factor in self.labels.values.get(index, ()):
                self.labels.fix(factor.labels, "a constant that no rule follows")
        keep_read_tables(self.labels, self.graph.kernels, self.fixed, self.looked_up)
        return self.labels

    def _is_followed(self, value: ir.Value) -> bool:
        """Whether the channels of a value are known by what made it, and not by what reads it alone."""
        return value.live or (value.index in self.constants.made and bool(self._of(value)))

    def _of(self, value: ir.Value) -> tuple[Factor, ...]:
        return self.labels.values.get(value.index, ())

    def _step(self, op: ir.Op) -> Sequence[Factor]:
        match op:
            case ir.Source():
                return self._table(op)
            case ir.Kernel():
                return self._kernel(op)
            case ir.Sum() | ir.Gate():
                return self._meet(op.inputs, op.output.shape)
            case ir.Gather():
                return self._gather(op)
            case ir.Mix():
                if not op.equation:
                    return self._hold(op, "a product that no rule describes")
                for value, own in zero_operands(self.labels, op, self._of, self.constants.zeros):
                    self._set_constant(value, own)
                operands = [(value, self._of(value)) for value in op.inputs]
                wholes = None if self.whole_heads else self.wholes
                return distinct(contraction(self.labels, op, operands, self.place, wholes))
            case ir.Pool():
                never_zero = self.constants.offsets.get(op.inputs[0].index) == 1
                return pooled(self.labels, op, self._of(op.inputs[0]), never_zero, self._because)
            case ir.Affine():
                return [*self._meet(op.inputs, op.output.shape), *self._table(op)]
            case ir.Map():
                self._softmax(op)
                return self._meet(self.graph.in_both_modes(op), op.output.shape)
            case ir.Norm():
                self._norm(op)
                return self._meet(op.inputs, op.output.shape)
            case ir.Opaque():
                return self._hold(op, op.reason)
            case ir.Sink():
                return self._hold(op, "an output of the network")
            case _:
                raise TypeError(f"op kind {op.kind} is not known here: {op.node}")

    def _table(self, op: ir.Source | ir.Affine) -> Sequence[Factor]:
        """Return the factor of vectors of a table, all of which stay if it is excluded."""
        factors = table_factors(self.labels, self.graph.kernels, op, self._because)
        for factor in factors:
            self.looked_up.append(factor.labels.flatten())
            for name in {use.name for use in op.params} & set(self.fixed):
                self.labels.fix(factor.labels, f"{name} is excluded")
        return factors

    def _hold(self, op: ir.Op, reason: str) -> Sequence[Factor]:
        """Fix whatever comes in; nothing is known of what goes out."""
        for value in op.inputs:
            for factor in self._of(value):
                self.labels.fix(factor.labels, self._because(reason))
        return ()

    def _softmax(self, op: ir.Map) -> None:
        """Fix the labels along the axes that are summed over; what lies along others may go as a whole."""
        for factor in self._of(op.inputs[0]):
            summed = [axis for axis in factor.axes if axis in op.axes]
            if summed and len(summed) < len(factor.axes):
                self.labels.tie(factor.labels, factor.labels.amax(summed, keepdim=True))
            elif summed:
                self.labels.fix(factor.labels, self._because("computed from all channels, as by a softmax"))

    def _norm(self, op: ir.Norm) -> None:
        """Ask for equal numbers of channels in each part of a group norm; others go with what was there."""
        for factor in self._of(op.inputs[0]):
            if op.groups > 1 and factor.axes == (1,):
                parts = factor.labels.flatten().view(op.groups, -1)
                self.labels.lines.append(Lines(parts, op.inputs[0].index, self.place))
            elif (op.groups > 1 and 1 in factor.axes) or set(op.held) & set(factor.axes):
                self.labels.fix(factor.labels, self._because("a statistic over channels"))

    def _because(self, reason: str) -> str:
        return f"{self.place}: {reason}" if self.place else reason

    # -- elementwise ------------------------------------------------------------------------------------
    def _meet(self, inputs: Sequence[ir.Value], shape: Sequence[int]) -> Sequence[Factor]:
        """Tie the labels that meet in one entry; fix those that meet entries which cannot go."""
        rank = len(shape)
        followed = [value for value in inputs if self._is_followed(value)]
        sides = [(value, aligned(self._of(value), len(value.shape), rank)) for value in followed]
        sizes = [(1,) * (rank - len(value.shape)) + self.repeats.shape(value) for value, _ in sides]
        found: list[Factor] = []
        for place, (_, factors) in enumerate(sides):
            for factor in factors:
                if any(sizes[place][axis] != shape[axis] for axis in factor.axes):
                    self.labels.fix(factor.labels, self._because("a channel is broadcast over others"))
                    continue
                free = [
                    self._partner(factor, sizes[place], sizes[other], others)
                    for other, (_, others) in enumerate(sides)
                    if other != place
                ]
                if all(free):
                    found.append(factor)
        for factor in (found := distinct(found)):
            for value in followed:
                axis = len(value.shape) - rank + factor.axes[0]
                if len(factor.axes) == 1 and axis >= 0 and value.shape[axis] == factor.labels.numel():
                    self._fill_zeros(value, axis, factor.labels.flatten())
        for value in inputs if followed else ():  # what is computed of constants waits for who reads it
            if not self._is_followed(value):
                self._label_constant(value, found, rank)
            elif self.repeats.of(value):
                self._label_repeats(value, found, rank)
        return found

    def _label_repeats(self, value: ir.Value, factors: Sequence[Factor], rank: int) -> None:
        """Let the entries of a value that repeats one of them go with the entries that they meet."""
        own = self.repeats.along(value, factors, rank)
        self.labels.values[value.index] = (*self._of(value), *own)
        maker = self.graph.op_of(value)
        for each in maker.inputs if own and not isinstance(maker, (ir.Gather, NoneType)) else ():
            if self.repeats.of(each):
                self._label_repeats(each, own, len(value.shape))
            elif not self._is_followed(each):
                self._label_constant(each, own, len(value.shape))

    def _label_constant(self, value: ir.Value, factors: Sequence[Factor], rank: int) -> None:
        """Let the entries of a constant go with the entries that it is combined with."""
        more = rank - len(value.shape)
        own = []
        for factor in factors:
            if all(axis >= more and value.shape[axis - more] > 1 for axis in factor.axes):
                axes = tuple(axis - more for axis in factor.axes)
                own.append(Factor(axes, factor.labels.reshape(factor.labels.shape[more:])))
        self._set_constant(value, own)

    def _set_constant(self, value: ir.Value, own: Sequence[Factor]) -> None:
        """Give a constant its labels; those that it has from another use must go together with them."""
        known = self.labels.values.setdefault(value.index, tuple(own))
        for one, other in ((known, own), (own, known)):
            for factor in one:
                partner = next((each for each in other if each.axes == factor.axes), None)
                if partner is None:
                    self.labels.fix(factor.labels, self._because("a constant that is also read whole"))
                else:
                    self.labels.tie(factor.labels, partner.labels)
        maker = self.graph.op_of(value)
        if isinstance(maker, ir.Gather):
            self._label_moved_constants(maker, own)
        elif isinstance(maker, ir.Mix):
            for each, factors in behind_product(maker, own, self._is_followed):
                self._set_constant(each, factors)
        elif isinstance(maker, ir.Pool) and maker.keepdim and not self._is_followed(maker.inputs[0]):
            rest = [factor for factor in own if not set(factor.axes) & set(maker.dims)]
            self._set_constant(maker.inputs[0], rest)
        elif isinstance(maker, POINTWISE) and not any(self._is_followed(each) for each in maker.inputs):
            for each in maker.inputs:
                self._label_constant(each, () if sums_up(maker) else own, len(value.shape))

    def _partner(
        self, factor: Factor, own: Sequence[int], size: Sequence[int], others: Sequence[Factor]
    ) -> bool:
        """Tie ``factor`` to what it meets in one other operand; False if that fixes it.

        ``own`` and ``size``: the two operands' shapes. A factor of one entry per head, say, meets one of
        several channels per head: these may go one by one, the head may not.
        """
        wide = [axis for axis in factor.axes if size[axis] > 1]
        if not wide or (len(wide) < len(factor.axes) and not self.whole_heads):
            return True
        overlapping = [other for other in others if set(other.axes) & set(factor.axes)]
        if not overlapping:
            self.labels.fix(factor.labels, self._because("meets entries that cannot be removed"))
            return False
        for other in overlapping:
            more = set(other.axes) - set(factor.axes)
            if not self.whole_heads and any(own[axis] == 1 for axis in more):
                reason = self._because("scales channels that may go one by one")
                self.wholes.append(Whole(factor.labels, other.labels, reason, self.place))
                return False
            self.labels.tie(factor.labels, other.labels)
        return True

    # -- data movement ----------------------------------------------------------------------------------
    def _gather(self, op: ir.Gather) -> Sequence[Factor]:
        families = list(dict.fromkeys(f.axes for value in op.inputs for f in self._of(value)))
        found: list[Factor] = []
        for axes in families:
            parts = [self._full(value, axes) for value in op.inputs]
            moved = moved_labels(self.labels, op, parts)
            factor = thin(moved.long())
            if factor is None:
                self.labels.fix(moved.flatten().long(), self._because("one channel is read alone"))
                continue
            if bool((factor.labels <= FIXED).all()) or any(factor == other for other in found):
                continue
            reason = self._because("channels along two axes become one axis")
            found = merged(self.labels, found, factor, reason)
            if len(factor.axes) > 1 and factor in found:
                self._record_lines(op.output, factor)
        self._label_moved_constants(op, found)
        return found

    def _label_moved_constants(self, op: ir.Gather, factors: Sequence[Factor]) -> None:
        """Let the entries of a constant that is moved beside channels go with them."""
        for place, value in enumerate(op.inputs):
            if self._is_followed(value):
                continue
            parts = [torch.zeros(other.shape) for other in op.inputs]
            parts[place] = torch.arange(1, 1 + parts[place].numel()).float().view(value.shape)
            entries = op.move.reading_zeros()(*parts).long()
            own = []
            for factor in factors:
                labels = torch.full((parts[place].numel() + 1,), FILLED)
                labels[entries.flatten()] = factor.labels.expand(entries.shape).flatten()
                own.append(thin(labels[1:].view(value.shape)))
            if any(factor is not None for factor in own):
                self._set_constant(value, distinct([factor for factor in own if factor is not None]))

    def _full(self, value: ir.Value, axes: tuple[int, ...]) -> Tensor:
        """Labels of a value's full shape, as floats: those of its factor along ``axes``, or fixed ones."""
        own = [factor for factor in self._of(value) if set(factor.axes) & set(axes)]
        if own and self._is_followed(value):
            labels = min(own, key=lambda factor: factor.axes != axes).labels
        else:
            labels = torch.full((1,) * len(value.shape), FIXED if value.live else FILLED)
        return labels.float().expand(value.shape)

    def _record_lines(self, value: ir.Value, factor: Factor) -> None:
        labels = factor.labels.reshape([factor.labels.shape[axis] for axis in factor.axes])
        self.labels.lines.append(Lines(labels, value.index, self.place))

    # -- contractions with parameters -------------------------------------------------------------------
    def _kernel(self, op: ir.Kernel) -> Sequence[Factor]:
        value, windows = op.inputs[0], 0 if op.window is None else len(op.window.kernel)
        axis = len(value.shape) - 1 - windows
        spatial = set(range(axis + 1, len(value.shape)))
        passed, along = [], []
        for factor in self._of(value):
            if axis in factor.axes:
                along.append(column_of(self.labels, factor, axis))
            elif spatial & set(factor.axes) and not (op.window is not None and op.window.keeps_positions):
                self.labels.fix(factor.labels, self._because("positions of a convolution"))
            else:
                passed.append(factor)
        sizes = op.output.shape[axis], value.shape[axis]
        rows, columns = sides_of(self.labels, self.graph.kernels, op, sizes, self._because)
        if len(along) == 1:
            self.labels.tie(along[0], columns)
            self._fill_zeros(value, axis, columns)
        elif not along and self.constants.may_be_cut(value):  # such as the first state of a recurrent layer
            self._set_constant(value, [along_axis(axis, columns, len(value.shape))])
        elif not along and (zero := self.constants.zeros_along(value, axis)) is not None:
            self._read_zeros(value, axis, columns, zero)
        else:
            reason = "read together with positions" if along else "reads channels that cannot be removed"
            for labels in (*along, columns):
                self.labels.fix(labels, self._because(reason))
        if op.weight.name is None:
            for labels in along:
                self.labels.fix(labels, self._because("read by weights that are not pruned"))
        if op.groups > 1:
            tie_parts(self.labels, op, rows, columns, self.place)
        self.labels.sides.append(Sides(self.number, op.weight.name, rows, columns))
        if len(rows) == 1 or bool((rows == FIXED).all()):
            self.labels.fix(rows, self._because("the only output channel"))
            return passed
        return [*passed, along_axis(axis, rows, len(op.output.shape))]

    def _read_zeros(self, value: ir.Value, axis: int, columns: Tensor, zero: Tensor) -> None:
        """Let zeros, as of the first state of a layer written by hand, go with the columns that read them."""
        self.labels.fix(columns[~zero], self._because("reads channels that cannot be removed"))
        self._label_zeros(
            value, self._of(value), along_axis(axis, columns.where(zero, FIXED), len(value.shape))
        )

    def _fill_zeros(self, value: ir.Value, axis: int, columns: Tensor) -> None:
        """Let zeros beside channels, such as a first state or padding, go with what they meet, as well."""
        own = next((factor for factor in self._of(value) if factor.axes == (axis,)), None)
        if own is None or not bool((own.labels == FILLED).any()):
            return
        filled, maker = (own.labels.flatten() == FILLED) & (columns != FILLED), self.graph.op_of(value)
        if isinstance(maker, (ir.Affine, ir.Map, ir.Norm, ir.Pool)):
            before = maker.inputs[0]
            if len(before.shape) == len(value.shape) and before.shape[axis] == value.shape[axis]:
                self._fill_zeros(before, axis, columns.where(filled, FILLED))
        elif (zero := self.constants.zeros_along(value, axis)) is not None:
            filled &= zero
        else:
            return
        if bool(filled.any()):
            rest = [factor for factor in self._of(value) if factor is not own]
            labels = own.labels.flatten().where(~filled, columns)
            self._label_zeros(value, rest, along_axis(axis, labels, len(value.shape)))

    def _label_zeros(self, value: ir.Value, rest: Sequence[Factor], factor: Factor) -> None:
        """Give a value another factor, and the zeros that were moved into it the labels there."""
        self.labels.values[value.index] = (*rest, factor)
        maker = self.graph.op_of(value)
        if isinstance(maker, ir.Gather):
            self._label_moved_constants(maker, [factor])
