"""Recurrent layers and cells, written out: the gates of one hidden unit read the same units and states.

A layer is lowered for all time steps at once: every pass computes the state of each step from the state of
the step before, as the pass before has it. As many passes as there are steps give the layer exactly. Longer
sequences get ``PASSES`` of them, in which a state reaches all later steps at once: then a path may cross the
recurrent weights that often, and no path that the layer has with fewer crossings is missing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, Operand, TensorFunction
from fxprune.graph.units import Units, UnitSide
from fxprune.lowering.rules.pool import accumulate
from fxprune.lowering.rules.table import Context, RuleTable
from fxprune.lowering.rules.weighted import module_weight
from fxprune.torch_private import pack_padded_sequence, pad_packed_sequence

__all__ = ["table"]

table = RuleTable()

PASSES = 8

States = tuple[ir.Value, ...]
"""The hidden state; for an LSTM also that of the cells."""


@dataclass(frozen=True)
class _Cell:
    """One direction of one layer: the names of its parameters end in ``suffix``."""

    context: Context
    suffix: str

    @property
    def gates(self) -> int:
        m = self.context.module
        if isinstance(m, (nn.LSTM, nn.LSTMCell)):
            return 4
        return 3 if isinstance(m, (nn.GRU, nn.GRUCell)) else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of the states."""
        m: Any = self.context.module
        hidden = getattr(m, "proj_size", 0) or m.hidden_size
        return (hidden, m.hidden_size) if self.gates == 4 else (hidden,)

    @property
    def units(self) -> list[tuple[UnitSide, ...]]:
        """The parts of parameters that belong to a hidden unit, and to a projected one."""

        def side(name: str, which: Literal["out", "in"], parts: int = 1) -> UnitSide:
            ref = module_weight(self.context, f"weight_{name}{self.suffix}")
            return UnitSide(ref.name or "", which, parts)

        rows = side("ih", "out", self.gates), side("hh", "out", self.gates)
        if getattr(self.context.module, "proj_size", 0):
            return [(*rows, side("hr", "in")), (side("hr", "out"), side("hh", "in"))]
        return [(*rows, side("hh", "in"))]

    def product(self, x: ir.Value, name: str, *, counts: bool = True) -> ir.Value:
        bias = getattr(self.context.module, f"bias_{name}{self.suffix}", None)
        ref = module_weight(self.context, f"weight_{name}{self.suffix}")
        return self.context.build.linear(x, ref, bias=bias, weights=None if counts else 0)

    def step(self, taken: ir.Value, states: States, *, counts: bool = True) -> States:
        """The states after a step; ``taken`` is the input, multiplied with its weights.

        ``counts``: whether the multiply-adds are not those of another pass.
        """
        fed = self.product(states[0], "hh", counts=counts)
        if self.gates == 4:
            return self._lstm(taken, fed, states[1], counts)
        if self.gates == 3:
            return self._gru(taken, fed, states[0])
        return (self.context.build.sum([taken, fed], taken.shape),)  # tanh and relu give zero for zero

    def _lstm(self, taken: ir.Value, fed: ir.Value, cell: ir.Value, counts: bool) -> States:
        build, shape = self.context.build, cell.shape
        take, keep, new, out = self._parts(build.sum([taken, fed], taken.shape))
        kept = build.gate(build.map(keep, floor=True), cell, shape)
        cell = build.sum([kept, build.gate(build.map(take, floor=True), new, shape)], shape)
        hidden = build.gate(build.map(out, floor=True), cell, shape)
        m: Any = self.context.module
        return self.product(hidden, "hr", counts=counts) if getattr(m, "proj_size", 0) else hidden, cell

    def _gru(self, taken: ir.Value, fed: ir.Value, hidden: ir.Value) -> States:
        build, shape = self.context.build, hidden.shape
        (reset, update, new), (more, further, old) = self._parts(taken), self._parts(fed)
        reset = build.map(build.sum([reset, more], shape), floor=True)
        update = build.map(build.sum([update, further], shape), floor=True)
        new = build.sum([new, build.gate(reset, old, shape)], shape)
        return (build.sum([build.gate(update, new, shape), build.gate(update, hidden, shape)], shape),)

    def _parts(self, x: ir.Value) -> list[ir.Value]:
        shape = (*x.shape[:-1], x.shape[-1] // self.gates)
        cut = TensorFunction.of("chunk", PREVIOUS, self.gates, -1)
        build = self.context.build
        return [build.gather(cut.then(operator.getitem, PREVIOUS, i), [x], shape) for i in range(self.gates)]


@table.rule(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
def cell(context: Context, x: Any, hx: Any = None) -> Any:
    """One step."""
    build, one = context.build, _Cell(context, "")
    value = build.materialise(x)
    given = hx if isinstance(hx, (tuple, list)) else (hx,) * len(one.sizes)
    states = [
        _zeros(context, (*value.shape[:-1], size)) if state is None else build.materialise(state)
        for state, size in zip(given, one.sizes, strict=True)
    ]
    after = one.step(one.product(value, "ih"), tuple(states))
    _note_units(context, [one])
    return after if isinstance(context.result, (tuple, list)) else after[0]


@table.rule(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(context: Context, x: Any, hx: Any = None) -> Any:
    """Every step reaches every later one, by way of the states."""
    m: Any = context.module
    if isinstance(x, PackedSequence):
        out, states = _layers(context, _unpacked(context, x.data, x.batch_sizes.shape[0]), hx, 0)
        rows = TensorFunction.of("flatten", PREVIOUS, 0, 1)
        data = context.build.gather(rows, [out], (x.data.shape[0], out.shape[-1]))
        kind: Any = type(x)
        return kind._make((data, *x[1:])), states
    value = context.build.materialise(x)
    return _layers(context, value, hx, 1 if m.batch_first and len(value.shape) == 3 else 0)


def _unpacked(context: Context, data: Any, steps: int) -> ir.Value:
    """Packed data with axes for steps and samples: capture gives all sequences the length of the longest."""
    value = context.build.materialise(data)
    shape = (steps, value.shape[0] // steps, *value.shape[1:])
    return context.build.gather(TensorFunction.of("reshape", PREVIOUS, shape), [value], shape)


@table.rule(pack_padded_sequence)
def pack(context: Context, x: Any, lengths: Any, batch_first: bool = False) -> Any:
    """The steps of all sequences, one step after the other."""
    value, (data, sizes) = context.build.materialise(x), context.result
    steps = TensorFunction.of("narrow", Operand(0), int(batch_first), 0, sizes.shape[0])
    if batch_first:
        steps = steps.then("transpose", PREVIOUS, 0, 1)
    packed = context.build.gather(steps.then("flatten", PREVIOUS, 0, 1), [value], data.shape)
    return packed, context.build.source(sizes.shape, live=False)


@table.rule(pad_packed_sequence)
def pad(
    context: Context, data: Any, sizes: Any, batch_first: bool = False, padding: float = 0.0, total: int = -1
) -> Any:
    """The sequences with an axis for samples again; the padding is on no path."""
    value, (padded, lengths) = _unpacked(context, data, sizes.shape[0]), context.result
    more = padded.shape[int(batch_first)] - sizes.shape[0]
    steps = TensorFunction.of(F.pad, Operand(0), [0, 0] * (len(value.shape) - 1) + [0, more])
    if batch_first:
        steps = steps.then("transpose", PREVIOUS, 0, 1)
    result = context.build.gather(steps, [value], padded.shape)
    return result, context.build.source(lengths.shape, live=False)


def _layers(context: Context, value: ir.Value, hx: Any, time: int) -> Any:
    """The outputs and last states of all layers, for steps along an axis."""
    m: Any = context.module
    build = context.build
    finals: list[States] = []
    cells: list[_Cell] = []
    for layer in range(m.num_layers):
        outputs = []
        for backwards in range(2 if m.bidirectional else 1):
            one = _Cell(context, f"_l{layer}{'_reverse' if backwards else ''}")
            first = _initial(context, one, hx, len(finals), time)
            states = _scan(one, value, first, time, bool(backwards))
            cells.append(one)
            outputs.append(states[0])
            finals.append(states)
        shape = (*value.shape[:-1], sum(output.shape[-1] for output in outputs))
        join = TensorFunction.of(torch.cat, [Operand(i) for i in range(len(outputs))], -1)
        value = build.gather(join, outputs, shape)
    _note_units(context, cells)
    users = context.node.users
    if users and all(user.target is operator.getitem and user.args[1] == 0 for user in users):
        return value, None
    return value, _final(context, finals, time)


def _note_units(context: Context, cells: list[_Cell]) -> None:
    """Note the widths that all layers and directions of the module have in common."""
    for lines in zip(*(cell.units for cell in cells), strict=True):
        context.build.units[Units(context.build.layer, lines)] = None


def _scan(cell: _Cell, x: ir.Value, first: States | None, time: int, backwards: bool) -> States:
    """The states of every step."""
    context = cell.context
    length = x.shape[time]
    taken = cell.product(x, "ih")
    shapes = [(*x.shape[:-1], size) for size in cell.sizes]
    states: States = tuple(_zeros(context, shape) for shape in shapes)
    is_exact = length <= PASSES
    last = min(length, PASSES) - 1
    for number in range(last + 1):
        before = tuple(
            _shifted(context, state, None if first is None else first[i], time, backwards)
            for i, state in enumerate(states)
        )
        if not is_exact:
            before = tuple(
                accumulate(_shaped(context, state), state, time, backwards=backwards) for state in before
            )
        states = cell.step(taken, before, counts=number == last)  # every pass goes over all steps
    return states


def _shaped(context: Context, x: ir.Value) -> Context:
    return replace(context, result=torch.empty(x.shape, device="meta"))


def _zeros(context: Context, shape: tuple[int, ...]) -> ir.Value:
    return context.build.source(shape, live=False, pattern=torch.zeros(shape, dtype=torch.bool))


def _shifted(context: Context, x: ir.Value, first: ir.Value | None, time: int, backwards: bool) -> ir.Value:
    """The state before every step: that of its neighbour, and ``first`` (or zeros) at the end."""
    length = x.shape[time]
    if first is None:
        amounts = [0, 0] * (len(x.shape) - 1 - time) + ([-1, 1] if backwards else [1, -1])
        return context.build.gather(TensorFunction.of(F.pad, PREVIOUS, amounts), [x], x.shape)
    rest = TensorFunction.of("narrow", Operand(0), time, int(backwards), length - 1)
    parts = [PREVIOUS, Operand(1)] if backwards else [Operand(1), PREVIOUS]
    return context.build.gather(rest.then(torch.cat, parts, time), [x, first], x.shape)


def _initial(context: Context, cell: _Cell, hx: Any, place: int, time: int) -> States | None:
    """The given states of one direction, with an axis for time."""
    if hx is None:
        return None
    given = hx if isinstance(hx, (tuple, list)) else (hx,)
    pick = TensorFunction.of("select", PREVIOUS, 0, place).then("unsqueeze", PREVIOUS, time)
    values = [context.build.materialise(state) for state in given]

    def shape(value: ir.Value) -> list[int]:
        own = list(value.shape[1:])
        return [*own[:time], 1, *own[time:]]

    return tuple(context.build.gather(pick, [value], shape(value)) for value in values)


def _final(context: Context, finals: list[States], time: int) -> Any:
    """The states after the last step, one row for each direction of each layer."""
    m: Any = context.module

    def joined(which: int) -> ir.Value:
        rows = []
        for place, states in enumerate(finals):
            state = states[which]
            last = 0 if m.bidirectional and place % 2 else state.shape[time] - 1
            pick: Callable[..., TensorFunction] = TensorFunction.of("select", PREVIOUS, time, last).then
            shape = [1, *state.shape[:time], *state.shape[time + 1 :]]
            rows.append(context.build.gather(pick("unsqueeze", PREVIOUS, 0), [state], shape))
        join = TensorFunction.of(torch.cat, [Operand(i) for i in range(len(rows))], 0)
        return context.build.gather(join, rows, [len(rows), *rows[0].shape[1:]])

    count = len(finals[0])
    return joined(0) if count == 1 else tuple(joined(which) for which in range(count))
