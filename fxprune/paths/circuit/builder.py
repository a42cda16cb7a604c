"""Turn the steps of a program into the parts of a circuit, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.circuit.linear_maps import matrices, picked
from fxprune.paths.circuit.parts import (
    Closure,
    Contraction,
    Function,
    Part,
    Presence,
    PresenceFunction,
    Sparse,
    Wire,
)
from fxprune.paths.context import EvalContext, Pooling, unit_operand
from fxprune.paths.layout import Layout, explicit, reader, reduced_shape
from fxprune.paths.program import Half, Program, Step

__all__ = ["CircuitBuilder"]


class CircuitBuilder:
    """Collects ``parts``, ``sources`` and ``presences``.

    Values have the indices of the program; values that only the circuit has are negative. An index whose
    value equals another one's entry by entry is an alias of it, see :meth:`resolve`.
    """

    def __init__(self, program: Program, pool: Pooling, dtype: torch.dtype) -> None:
        self.program, self.pool, self.dtype = program, pool, dtype
        self.layouts = {step.output: step.layout for step in program.steps}
        self.parts: list[Part] = []
        self.presences: list[Presence] = []
        self.sources: list[tuple[int, Tensor]] = []
        self._has_presence: set[int] = set()
        self._aliases: dict[int, int] = {}
        self._last_new = 0
        self._generator = torch.Generator().manual_seed(0x5EED)

    def resolve(self, index: int) -> int:
        """The value that ``index`` is an alias of, or itself."""
        return self._aliases.get(index, index)

    def _new_value(self) -> int:
        self._last_new -= 1
        return self._last_new

    # -- paths ------------------------------------------------------------------------------------------
    def add_paths(self, step: Step) -> None:
        """Add the parts that count the paths of ``step``."""
        op = step.op
        if step.pattern is not None:
            self.sources.append((step.output, step.pattern.flatten()))
        elif isinstance(op, ir.Kernel) and op.weight.name is not None:
            self._add_contraction(op, step.layout)
        elif step.linear is not None:
            self._add_linear(step)
        else:
            self._add_product(step.output, step.halves)

    def _add_contraction(self, op: ir.Kernel, out: Layout) -> None:
        """A matrix on channels, which are told apart and moved last before it, and moved back after it."""
        source, layout = op.inputs[0].index, self.layouts[op.inputs[0].index]
        fine = _by_channel(op, layout)
        if reduced_shape(fine) != reduced_shape(layout) or _positions(op, out) > 1:
            source = self._add_channels_last(source, layout, fine, op)
        if _positions(op, out) == 1:
            self.parts.append(_contraction(op, (self.resolve(source),), op.output.index, out))
            return
        product = self._new_value()
        self.parts.append(_contraction(op, (self.resolve(source),), product, out))
        shape = _channels_last(op, torch.empty(reduced_shape(out))).shape
        restore = _from_channels_last(op, shape)
        self._add_map(op.output.index, (product,), [shape], lambda tensors: restore(tensors[0]))

    def _add_channels_last(self, source: int, layout: Layout, fine: Layout, op: ir.Kernel) -> int:
        """A new value: ``source`` read at the layout ``fine``, channels last."""
        read, shape, result = reader(layout, fine), reduced_shape(layout), self._new_value()

        def function(tensors: Sequence[Tensor]) -> Tensor:
            return _channels_last(op, read(tensors[0].view(shape))).flatten()

        self._add_map(result, (source,), [shape], function)
        return result

    def _add_linear(self, step: Step) -> None:
        """An op without prunable weights that is linear in its inputs; inputs without paths are zeros."""
        linear, shapes = step.linear, self.program.shapes
        assert linear is not None, "a linear step has a function"
        live = [value.live for value in step.op.inputs]
        all_shapes = [shapes[value.index] for value in step.op.inputs]

        def function(tensors: Sequence[Tensor]) -> Tensor:
            given = iter(tensors)
            full = [
                next(given).view(shape) if is_live else tensors[0].new_zeros(shape)
                for is_live, shape in zip(live, all_shapes, strict=True)
            ]
            return linear(_context(tensors[0], self.pool), full).flatten()

        inputs = tuple(value.index for value in step.op.inputs if value.live)
        self._add_map(step.output, inputs, [shapes[index] for index in inputs], function)

    def _add_product(self, output: int, halves: Sequence[Half]) -> None:
        """The sum of the paths through either factor, each where the other is present."""
        shapes = [self.program.shapes[half.live] for half in halves]
        present = tuple(half.other for half in halves if half.ones is None)

        def function(tensors: Sequence[Tensor]) -> Tensor:
            paths, presence = tensors[: len(halves)], iter(tensors[len(halves) :])
            terms = []
            for half, x, shape in zip(halves, paths, shapes, strict=True):
                if half.ones is None:
                    other = next(presence).view(self.program.shapes[half.other])
                else:
                    other = x.new_ones(half.ones)
                terms.append(half.product(x.view(shape), other))
            return sum(terms[1:], terms[0]).flatten()

        inputs = tuple(half.live for half in halves)
        if present:
            self.parts.append(Closure(output, tuple(map(self.resolve, inputs)), function, present))
        else:
            self._add_map(output, inputs, shapes, function)

    def _add_map(
        self, output: int, inputs: tuple[int, ...], shapes: Sequence[tuple[int, ...]], function: Function
    ) -> None:
        """A fixed linear map, in its cheapest form.

        An alias if nothing changes, a wire if each output is a sum of single entries of the inputs, a sparse
        matrix if that is found fast, else a closure.
        """
        inputs = tuple(self.resolve(index) for index in inputs)
        sizes = [math.prod(shape) for shape in shapes]
        picks = [self._pick(place, sizes, function) for place in range(len(sizes))]
        wires = [pick for pick in picks if pick is not None]
        if len(wires) == len(picks):
            indices, coefficients = zip(*wires, strict=True)
            if len(inputs) == 1 and indices[0] is None and coefficients[0] == 1:
                self._aliases[output] = inputs[0]
            else:
                self.parts.append(Wire(output, inputs, indices, coefficients))
            return
        found = matrices(sizes, function, self.dtype)
        part = Closure(output, inputs, function) if found is None else Sparse(output, inputs, *found)
        self.parts.append(part)

    def _pick(
        self, place: int, sizes: Sequence[int], function: Function
    ) -> tuple[Tensor | None, float] | None:
        """The entry of the input at ``place`` that each output takes, times a constant; None if it is no one
        entry.
        """
        probe = 1 + torch.rand(sizes[place], generator=self._generator, dtype=torch.float64)
        zeros = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        return picked(probe, function([*zeros[:place], probe, *zeros[place + 1 :]]))

    # -- presence ---------------------------------------------------------------------------------------
    def add_presence(self, step: Step) -> None:
        """Add what computes where the output of ``step`` is present."""
        op, function = step.op, self._presence_function(step)
        inputs = tuple(value.index for value in op.inputs if value.index in self._has_presence)
        if not isinstance(op, ir.Kernel) or op.weight.name is None:
            self.presences.append(Presence(step.output, inputs, function))
        elif _positions(op, step.layout) == 1:
            contraction = _contraction(op, (), step.output, step.layout)
            self.presences.append(Presence(step.output, inputs, function, contraction))
        else:
            product = self._new_value()
            contraction = _contraction(op, (), product, step.layout)
            restore = _from_channels_last(
                op, _channels_last(op, torch.empty(reduced_shape(step.layout))).shape
            )
            self.presences += [
                Presence(product, inputs, function, contraction),
                Presence(step.output, (product,), lambda tensors, one: restore(tensors[0])),
            ]
        self._has_presence.add(step.output)

    def _presence_function(self, step: Step) -> PresenceFunction:
        """The presence of the output, or of what a contraction reads."""
        op, linear, product, pattern = step.op, step.linear, step.product, step.pattern
        if pattern is not None:
            return lambda tensors, one: pattern.flatten().to(one)
        is_known = [value.index in self._has_presence for value in op.inputs]
        shapes = [self.program.shapes[value.index] for value in op.inputs]

        def full(tensors: Sequence[Tensor], one: Tensor) -> list[Tensor]:
            return _or_ones(tensors, one, is_known, shapes, shapes)

        if isinstance(op, ir.Kernel) and op.weight.name is not None:
            layout = self.layouts[op.inputs[0].index]
            read = reader(layout, _by_channel(op, layout))
            return lambda tensors, one: _channels_last(op, read(full(tensors, one)[0])).flatten()
        if linear is not None:
            return lambda tensors, one: linear(_context(one, "any", 1.0), full(tensors, one)).flatten()
        assert product is not None, "a step without a linear map is a product"
        single = [(1,) * len(shape) for shape in shapes]
        return lambda tensors, one: product(*_or_ones(tensors, one, is_known, shapes, single)).flatten()


def _or_ones(
    tensors: Sequence[Tensor],
    one: Tensor,
    is_known: Sequence[bool],
    shapes: Sequence[tuple[int, ...]],
    ones_shapes: Sequence[tuple[int, ...]],
) -> list[Tensor]:
    """The presence of every input: ``tensors`` for those that are known, and ones for the others."""
    given = iter(tensors)
    return [
        next(given).view(shape) if known else one.new_ones(ones_shape)
        for known, shape, ones_shape in zip(is_known, shapes, ones_shapes, strict=True)
    ]


def _context(like: Tensor, pooling: Pooling, constant: float = 0.0) -> EvalContext:
    """The context of steps without prunable weights, in the dtype and on the device of ``like``."""
    return EvalContext(lambda weight: unit_operand(weight).to(like), pooling, constant)


# -- contractions: channels last, one row per position -----------------------------------------------------
def _channel_axis(op: ir.Kernel) -> int:
    """The axis of channels, in the input as in the output."""
    return -1 if op.window is None else -1 - len(op.window.kernel)


def _by_channel(op: ir.Kernel, layout: Layout) -> Layout:
    """The layout of the op's input with every channel told apart."""
    fine = list(layout)
    fine[_channel_axis(op)] = explicit(layout[_channel_axis(op)].size)
    return tuple(fine)


def _positions(op: ir.Kernel, out: Layout) -> int:
    """The number of positions behind the channel axis that differ."""
    return 1 if op.window is None else math.prod(reduced_shape(out[_channel_axis(op) + 1 :]))


def _channels_last(op: ir.Kernel, values: Tensor) -> Tensor:
    return values.movedim(_channel_axis(op), -1)


def _from_channels_last(op: ir.Kernel, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Function that moves the channels of flat values (of ``shape``) back to the op's channel axis."""
    return lambda values: values.view(*shape).movedim(-1, _channel_axis(op)).flatten()


def _contraction(op: ir.Kernel, inputs: tuple[int, ...], output: int, out: Layout) -> Contraction:
    name = op.weight.name
    assert name is not None, "only parameters make contractions"
    rows = math.prod(reduced_shape(out)) // out[_channel_axis(op)].size
    transposed = op.window is not None and op.window.transposed
    view = _whole if op.weight.view is None else op.weight.view
    return Contraction(output, inputs, name, view, op.groups, transposed, rows, op.weight.view is None)


def _whole(weight: Tensor) -> Tensor:
    return weight
