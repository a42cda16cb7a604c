"""Compiles a channel graph into a :class:`Circuit`, where that is exact.

In: a :class:`ChannelGraph`. Out: its circuit, or None where one number per kernel is not enough: a product
whose factors may be Zero for some masks, an image with borders (uneven transposed convolutions), a parameter
that is read in pieces that no view can describe. :func:`fxprune.graph.traverse.flow` serves those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.channels import Circuit, Closure, Contraction, Function, Op, Wire
from fxprune.graph.layout import Layout, explicit, reader, reduced_shape
from fxprune.graph.program import Half, Program, Step, compile_graph
from fxprune.graph.settings import Counting

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

    ``pool`` and ``products`` are those of :func:`fxprune.graph.traverse.flow`; geometric means of two factors
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
    compiler = _Compiler(program, _Constants(pool))
    for step in program.steps:
        if step.op.output.live:
            compiler.add(step)
    size = sum(math.prod(kernels.shape[:2]) for kernels in graph.kernels.values())
    dtype = torch.float64 if size < WIDE else torch.float32
    outputs = [
        (compiler.known(index), _multiplicities(layout).to(dtype)) for index, layout in program.outputs
    ]
    sources = [(index, value.to(dtype)) for index, value in compiler.sources]
    return Circuit(compiler.ops, sources, outputs, program.samples, graph.kernels, dtype)


def _is_constant(graph: ir.ChannelGraph, program: Program) -> bool:
    """Whether all steps but contractions are the same linear map whatever the masks are."""
    for step in program.steps:
        if step.needs_presence or (step.op.output.live and any(half.ones is None for half in step.halves)):
            return False
        op = step.op
        if isinstance(op, ir.Pool) and op.how == "max" and op.window is None and op.dims:
            return False
        if isinstance(op, ir.Kernel) and op.output.live and op.weight.name is not None:
            kernels = graph.kernels[op.weight.name]
            if not (_is_alike(op, step.layout, program) and _is_view(op, kernels) and _same(op, kernels)):
                return False
    return True


def _is_alike(op: ir.Kernel, layout: Layout, program: Program) -> bool:
    """Whether all positions are alike, before and after."""
    if op.window is None:
        return True
    rank = len(op.window.kernel)
    uneven = op.window.transposed and any(stride > 1 for stride in op.window.stride)
    spots = program.shapes[op.inputs[0].index][-rank:]
    return not uneven and all(n == 1 for n in spots) and all(axis.is_collapsed for axis in layout[-rank:])


def _is_view(op: ir.Kernel, kernels: ir.KernelSet) -> bool:
    """Whether a matrix of counts can stand for the weight, and be written through what is read of it."""
    matrix = torch.zeros(kernels.shape[:2])
    if op.weight.view is None:
        return True
    if kernels.shape[2:]:
        return False
    operand = op.weight.view(matrix)
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


@dataclass(frozen=True)
class _Constants:
    """The setting of steps without prunable weights: paths are counted."""

    counting: Counting
    constant: float = 0.0

    def operand(self, weight: ir.WeightRef) -> Tensor:
        return weight.operand(lambda name: torch.ones(weight.shape)).double()


class _Compiler:
    """Turns steps into ops, one by one."""

    def __init__(self, program: Program, setting: _Constants) -> None:
        self.program, self.setting = program, setting
        self.layouts = {step.output: step.layout for step in program.steps}
        self.ops: list[Op] = []
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
        name = op.weight.name
        assert name is not None, "only parameters make contractions"
        axis = -1 if op.window is None else -1 - len(op.window.kernel)
        source, layout = op.inputs[0].index, self.layouts[op.inputs[0].index]
        fine = list(layout)
        fine[axis] = explicit(layout[axis].size)
        if reduced_shape(tuple(fine)) != reduced_shape(layout):
            source = self._wired(source, layout, tuple(fine))
        rows = math.prod(reduced_shape(out)) // out[axis].size
        transposed = op.window is not None and op.window.transposed
        view = _whole if op.weight.view is None else op.weight.view
        inputs, is_whole = (self.known(source),), op.weight.view is None
        self.ops.append(
            Contraction(op.output.index, inputs, name, view, op.groups, transposed, rows, is_whole)
        )

    def _wired(self, source: int, layout: Layout, fine: Layout) -> int:
        """A new value: ``source`` read at a finer layout."""
        read, shape = reader(layout, fine), reduced_shape(layout)
        self.fresh -= 1
        self._emit(self.fresh, (source,), [shape], lambda tensors: read(tensors[0].view(shape)).flatten())
        return self.fresh

    def _linear(self, step: Step) -> None:
        linear, setting, shapes = step.linear, self.setting, self.program.shapes
        assert linear is not None, "a linear step has a function"
        live = [value.live for value in step.op.inputs]
        every = [shapes[value.index] for value in step.op.inputs]

        def function(tensors: Sequence[Tensor]) -> Tensor:
            given: Iterator[Tensor] = iter(tensors)
            full = [
                next(given).view(shape) if alive else tensors[0].new_zeros(shape)
                for alive, shape in zip(live, every, strict=True)
            ]
            return linear(setting, full).flatten()

        inputs = tuple(value.index for value in step.op.inputs if value.live)
        self._emit(step.output, inputs, [shapes[index] for index in inputs], function)

    def _halves(self, output: int, halves: Sequence[Half]) -> None:
        shapes = [self.program.shapes[half.live] for half in halves]

        def function(tensors: Sequence[Tensor]) -> Tensor:
            parts = [
                half.product(tensor.view(shape), tensor.new_ones(half.ones or ()))
                for half, tensor, shape in zip(halves, tensors, shapes, strict=True)
            ]
            return sum(parts[1:], parts[0]).flatten()

        self._emit(output, tuple(half.live for half in halves), shapes, function)

    def _emit(
        self, output: int, inputs: tuple[int, ...], shapes: Sequence[tuple[int, ...]], function: Function
    ) -> None:
        """A wire if every input is picked entry by entry (a new name, if nothing changes), or a closure."""
        inputs = tuple(self.known(index) for index in inputs)
        indices: list[Tensor | None] = []
        coefficients: list[float] = []
        sizes = [math.prod(shape) for shape in shapes]
        for place, size in enumerate(sizes):
            probe = 1 + torch.rand(size, generator=self.generator, dtype=torch.float64)
            others = [torch.zeros(n, dtype=torch.float64) for n in sizes]
            found = _picked(probe, function([*others[:place], probe, *others[place + 1 :]]))
            if found is None:
                self.ops.append(Closure(output, inputs, function))
                return
            indices.append(found[0])
            coefficients.append(found[1])
        if len(inputs) == 1 and indices[0] is None and coefficients[0] == 1:
            self.same[output] = inputs[0]
        else:
            self.ops.append(Wire(output, inputs, tuple(indices), tuple(coefficients)))


def _picked(probe: Tensor, result: Tensor) -> tuple[Tensor | None, float] | None:
    """``(index, c)`` with ``result = c * probe[index]`` (index None: the identity), if there are such."""
    if result.numel() == probe.numel() and result.numel():
        ratio = result / probe
        coefficient = float(ratio[0])
        if coefficient > 0 and bool((ratio - coefficient).abs().max() <= 1e-12 * coefficient):
            return None, float(f"{coefficient:.12g}")
    ordered, order = probe.sort()
    place = torch.searchsorted(ordered, result.contiguous()).clamp(max=probe.numel() - 1)
    if probe.numel() and torch.equal(ordered[place], result):
        return order[place], 1.0
    return None


def _whole(weight: Tensor) -> Tensor:
    return weight
