"""Compiles a channel graph into a :class:`Circuit`, where that is exact.

In: a :class:`ChannelGraph`. Out: its circuit, or None where one number per kernel is not enough: positions
that differ (uneven transposed convolutions), a maximum over channels, a parameter that is read in pieces that
no view can describe. :func:`fxprune.paths.count.flow` serves those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.linear_maps import matrices, picked
from fxprune.paths.circuit.parts import (
    Closure,
    Contraction,
    Function,
    Marking,
    Op,
    Presence,
    Sparse,
    Wire,
)
from fxprune.paths.context import EvalContext, Pooling, unit_operand
from fxprune.paths.layout import Layout, explicit, reader, reduced_shape
from fxprune.paths.program import Half, Program, Step, compile_graph

__all__ = ["circuit"]

WIDE = 1 << 22
"""Kernels from which on counts are kept in float32."""


def circuit(
    graph: ir.ChannelGraph,
    *,
    pool: Literal["sum", "mean"] = "sum",
    products: Literal["each", "mean"] = "each",
) -> Circuit | None:
    """The circuit of ``graph`` at channel resolution, or None where it has none; see the module's notes.

    ``pool`` and ``products`` are those of :func:`fxprune.paths.count.flow`; geometric means of two factors
    that both carry paths are no linear map, and have no circuit.

    >>> import fxprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = circuit(fxprune.lower(fxprune.capture(net, torch.ones(2, 4))))
    >>> round(math.exp(found.run({name: found.dense(name) for name in found.kernels}).log_total))
    64
    """
    program = compile_graph(graph, "channel")
    if not program.outputs or not _is_constant(graph, program):
        return None
    if products == "mean" and any(step.op.output.live and len(step.halves) > 1 for step in program.steps):
        return None
    size = sum(math.prod(kernels.shape[:2]) for kernels in graph.kernels.values())
    dtype = torch.float64 if size < WIDE else torch.float32
    compiler = _Compiler(program, pool, dtype)
    for step in program.steps:
        if step.op.output.live:
            compiler.add(step)
        if step.needs_presence:
            compiler.mark(step)
    outputs = [
        (compiler.known(index), _multiplicities(layout).to(dtype)) for index, layout in program.outputs
    ]
    sources = [(index, value.to(dtype)) for index, value in compiler.sources]
    return Circuit(compiler.ops, sources, outputs, program.samples, graph.kernels, dtype, compiler.presences)


def _is_constant(graph: ir.ChannelGraph, program: Program) -> bool:
    """Whether all steps but contractions are the same linear map for all masks that leave as much present."""
    for step in program.steps:
        op = step.op
        if isinstance(op, ir.Pool) and op.how == "max" and op.window is None and op.dims:
            return False
        is_used = op.output.live or step.needs_presence
        if isinstance(op, ir.Kernel) and is_used and op.weight.name is not None:
            kernels = graph.kernels[op.weight.name]
            if not (_is_alike(op, step.layout, program) and _is_view(op, kernels) and _same(op, kernels)):
                return False
    return True


def _is_alike(op: ir.Kernel, layout: Layout, program: Program) -> bool:
    """Whether all positions are alike, before and after, or each is read by itself."""
    if op.window is None or _is_position_wise(op):
        return True
    rank = len(op.window.kernel)
    uneven = op.window.transposed and any(stride > 1 for stride in op.window.stride)
    spots = program.shapes[op.inputs[0].index][-rank:]
    return not uneven and all(n == 1 for n in spots) and all(axis.is_collapsed for axis in layout[-rank:])


def _is_position_wise(op: ir.Kernel) -> bool:
    """Whether a convolution is a matrix product at every position."""
    window = op.window
    return (
        window is not None
        and window.is_pointwise
        and not window.transposed
        and all(stride == 1 for stride in window.stride)
    )


def _is_view(op: ir.Kernel, kernels: ir.KernelSet) -> bool:
    """Whether a matrix of counts can stand for the weight, and be written through what is read of it."""
    matrix = torch.zeros(kernels.shape[:2])
    if op.weight.view is None:
        return True
    if kernels.shape[2:]:
        return False
    operand: Tensor = op.weight.view(matrix)
    return operand.dim() == 2 and operand.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()


def _same(op: ir.Kernel, kernels: ir.KernelSet) -> bool:
    """Whether the taps that live here are those that live anywhere."""
    if not kernels.shape[2:]:
        return True
    live = torch.ones(kernels.shape[2:], dtype=torch.bool) if op.live_taps is None else op.live_taps
    return torch.equal(live.reshape(kernels.shape[2:]), kernels.live_taps)


def _multiplicities(layout: Layout) -> Tensor:
    """How many entries each entry of the reduced tensor stands for, flat."""
    total = torch.ones((), dtype=torch.float64)
    for axis in layout:
        total = total.unsqueeze(-1) * axis.multiplicity().double()
    return total.flatten()


def _context(like: Tensor, pooling: Pooling, constant: float = 0.0) -> EvalContext:
    """The context of steps without prunable weights, in the dtype and on the device of ``like``."""
    return EvalContext(lambda weight: unit_operand(weight).to(like), pooling, constant)


class _Compiler:
    """Turns steps into ops, one by one."""

    def __init__(self, program: Program, pool: Pooling, dtype: torch.dtype) -> None:
        self.program, self.pool, self.dtype = program, pool, dtype
        self.layouts = {step.output: step.layout for step in program.steps}
        self.ops: list[Op] = []
        self.presences: list[Presence] = []
        self.marked: set[int] = set()
        self.sources: list[tuple[int, Tensor]] = []
        self.generator = torch.Generator().manual_seed(0x5EED)
        self.fresh = -1
        self.same: dict[int, int] = {}

    def known(self, index: int) -> int:
        """The value that ``index`` is another name of, or itself."""
        return self.same.get(index, index)

    def add(self, step: Step) -> None:
        op = step.op
        if step.pattern is not None:
            self.sources.append((step.output, step.pattern.flatten()))
        elif isinstance(op, ir.Kernel) and op.weight.name is not None:
            self._contraction(op, step.layout)
        elif step.linear is not None:
            self._linear(step)
        else:
            self._halves(step.output, step.halves)

    def _contraction(self, op: ir.Kernel, out: Layout) -> None:
        source, layout = op.inputs[0].index, self.layouts[op.inputs[0].index]
        fine = _by_channel(op, layout)
        if reduced_shape(fine) != reduced_shape(layout) or _positions(op, out) > 1:
            source = self._wired(source, layout, fine, op)
        if _positions(op, out) == 1:
            self.ops.append(_contraction(op, (self.known(source),), op.output.index, out))
            return
        self.fresh -= 1
        self.ops.append(_contraction(op, (self.known(source),), self.fresh, out))
        shape = _last(op, torch.empty(reduced_shape(out))).shape
        back = _back(op, shape)
        self._emit(op.output.index, (self.fresh,), [shape], lambda tensors: back(tensors[0]))

    def _wired(self, source: int, layout: Layout, fine: Layout, op: ir.Kernel) -> int:
        """A new value: ``source`` read at a finer layout, channels last."""
        read, shape = reader(layout, fine), reduced_shape(layout)
        self.fresh -= 1
        self._emit(
            self.fresh,
            (source,),
            [shape],
            lambda tensors: _last(op, read(tensors[0].view(shape))).flatten(),
        )
        return self.fresh

    def _linear(self, step: Step) -> None:
        linear, shapes = step.linear, self.program.shapes
        assert linear is not None, "a linear step has a function"
        live = [value.live for value in step.op.inputs]
        every = [shapes[value.index] for value in step.op.inputs]

        def function(tensors: Sequence[Tensor]) -> Tensor:
            given: Iterator[Tensor] = iter(tensors)
            full = [
                next(given).view(shape) if alive else tensors[0].new_zeros(shape)
                for alive, shape in zip(live, every, strict=True)
            ]
            return linear(_context(tensors[0], self.pool), full).flatten()

        inputs = tuple(value.index for value in step.op.inputs if value.live)
        self._emit(step.output, inputs, [shapes[index] for index in inputs], function)

    def _halves(self, output: int, halves: Sequence[Half]) -> None:
        shapes = [self.program.shapes[half.live] for half in halves]
        present = [half.other for half in halves if half.ones is None]

        def function(tensors: Sequence[Tensor]) -> Tensor:
            marks = iter(tensors[len(halves) :])
            parts = []
            for half, tensor, shape in zip(halves, tensors, shapes, strict=False):
                if half.ones is None:
                    other = next(marks).view(self.program.shapes[half.other])
                else:
                    other = tensor.new_ones(half.ones)
                parts.append(half.product(tensor.view(shape), other))
            return sum(parts[1:], parts[0]).flatten()

        inputs = tuple(half.live for half in halves)
        if present:
            self.ops.append(Closure(output, tuple(map(self.known, inputs)), function, tuple(present)))
        else:
            self._emit(output, inputs, shapes, function)

    # -- presence -------------------------------------------------------------------------------------------
    def mark(self, step: Step) -> None:
        """Where the output of ``step`` is not Zero, as the interpreter has it."""
        op = step.op
        inputs = tuple(value.index for value in op.inputs if value.index in self.marked)
        is_kernel = isinstance(op, ir.Kernel) and op.weight.name is not None
        if not (isinstance(op, ir.Kernel) and is_kernel):
            self.presences.append(Presence(step.output, inputs, self._marking(step)))
        elif _positions(op, step.layout) == 1:
            contraction = _contraction(op, (), step.output, step.layout)
            self.presences.append(Presence(step.output, inputs, self._marking(step), contraction))
        else:
            self.fresh -= 1
            contraction = _contraction(op, (), self.fresh, step.layout)
            back = _back(op, _last(op, torch.empty(reduced_shape(step.layout))).shape)
            self.presences += [
                Presence(self.fresh, inputs, self._marking(step), contraction),
                Presence(step.output, (self.fresh,), lambda tensors, one: back(tensors[0])),
            ]
        self.marked.add(step.output)

    def _marking(self, step: Step) -> Marking:
        op, linear, product, pattern = step.op, step.linear, step.product, step.pattern
        if pattern is not None:
            return lambda tensors, one: pattern.flatten().to(one)
        tracked = [value.index in self.marked for value in op.inputs]
        known = _Marks(tracked, [self.program.shapes[value.index] for value in op.inputs])
        if isinstance(op, ir.Kernel) and op.weight.name is not None:
            layout = self.layouts[op.inputs[0].index]
            read = reader(layout, _by_channel(op, layout))
            return lambda tensors, one: _last(op, read(known.full(tensors, one)[0])).flatten()
        if linear is not None:
            return lambda tensors, one: linear(
                _context(one, "any", constant=1.0), known.full(tensors, one)
            ).flatten()
        assert product is not None, "a step without a linear map is a product"
        return lambda tensors, one: product(*known.factors(tensors, one)).flatten()

    def _emit(
        self, output: int, inputs: tuple[int, ...], shapes: Sequence[tuple[int, ...]], function: Function
    ) -> None:
        """A wire if every input is picked entry by entry (a new name, if nothing changes); else a matrix, or
        a closure where that would take long to find.
        """
        inputs = tuple(self.known(index) for index in inputs)
        indices: list[Tensor | None] = []
        coefficients: list[float] = []
        sizes = [math.prod(shape) for shape in shapes]
        for place, size in enumerate(sizes):
            probe = 1 + torch.rand(size, generator=self.generator, dtype=torch.float64)
            others = [torch.zeros(n, dtype=torch.float64) for n in sizes]
            found = picked(probe, function([*others[:place], probe, *others[place + 1 :]]))
            if found is None:
                found_matrices = matrices(sizes, function, self.dtype)
                self.ops.append(
                    Closure(output, inputs, function)
                    if found_matrices is None
                    else Sparse(output, inputs, *found_matrices)
                )
                return
            indices.append(found[0])
            coefficients.append(found[1])
        if len(inputs) == 1 and indices[0] is None and coefficients[0] == 1:
            self.same[output] = inputs[0]
        else:
            self.ops.append(Wire(output, inputs, tuple(indices), tuple(coefficients)))


class _Marks:
    """The inputs of a step on the track of presence: those that are tracked, and ones for the others."""

    def __init__(self, tracked: Sequence[bool], shapes: Sequence[tuple[int, ...]]) -> None:
        self.tracked, self.shapes = tracked, shapes

    def full(self, tensors: Sequence[Tensor], one: Tensor) -> list[Tensor]:
        """All of their reduced shapes."""
        given = iter(tensors)
        return [
            next(given).view(shape) if is_tracked else one.new_ones(shape)
            for is_tracked, shape in zip(self.tracked, self.shapes, strict=True)
        ]

    def factors(self, tensors: Sequence[Tensor], one: Tensor) -> list[Tensor]:
        """The same, where a factor that is present everywhere is one number."""
        given = iter(tensors)
        return [
            next(given).view(shape) if is_tracked else one.new_ones((1,) * len(shape))
            for is_tracked, shape in zip(self.tracked, self.shapes, strict=True)
        ]


def _axis(op: ir.Kernel) -> int:
    """Where channels are, in the input as in the output."""
    return -1 if op.window is None else -1 - len(op.window.kernel)


def _by_channel(op: ir.Kernel, layout: Layout) -> Layout:
    """The layout of the op's input with every channel told apart."""
    fine = list(layout)
    fine[_axis(op)] = explicit(layout[_axis(op)].size)
    return tuple(fine)


def _positions(op: ir.Kernel, out: Layout) -> int:
    """Positions that are told apart behind the channels."""
    return 1 if op.window is None else math.prod(reduced_shape(out[_axis(op) + 1 :]))


def _last(op: ir.Kernel, values: Tensor) -> Tensor:
    """Channels behind the positions."""
    return values.movedim(_axis(op), -1)


def _back(op: ir.Kernel, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Flat values of ``shape``, channels last, as the op has them, flat."""
    return lambda values: values.view(*shape).movedim(-1, _axis(op)).flatten()


def _contraction(op: ir.Kernel, inputs: tuple[int, ...], output: int, out: Layout) -> Contraction:
    name = op.weight.name
    assert name is not None, "only parameters make contractions"
    rows = math.prod(reduced_shape(out)) // out[_axis(op)].size
    transposed = op.window is not None and op.window.transposed
    view = _whole if op.weight.view is None else op.weight.view
    return Contraction(output, inputs, name, view, op.groups, transposed, rows, op.weight.view is None)


def _whole(weight: Tensor) -> Tensor:
    return weight
