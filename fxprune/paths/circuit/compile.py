"""Compile a channel graph to a :class:`Circuit`, where that is exact.

There is no circuit where one number per kernel is not enough: where positions differ (uneven transposed
convolutions), a maximum is taken over channels, or a parameter is read in pieces that no view can describe.
:func:`fxprune.paths.count.flow` serves those networks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.circuit.builder import CircuitBuilder
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.layout import Layout
from fxprune.paths.program import Program, compile_graph

__all__ = ["circuit"]

WIDE = 1 << 22
"""Kernels from which on counts are kept in float32."""


def circuit(
    graph: ir.ChannelGraph,
    *,
    pool: Literal["sum", "mean"] = "sum",
    products: Literal["each", "mean"] = "each",
) -> Circuit | None:
    """Compile ``graph`` at channel resolution; None where it has no circuit, see the notes of the module.

    ``pool`` and ``products`` are those of :func:`fxprune.paths.count.flow`. The geometric mean of two factors
    that both carry paths is not linear, so that there is no circuit with it.

    >>> import fxprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = circuit(fxprune.lower(fxprune.capture(net, torch.ones(2, 4))))
    >>> round(math.exp(found.run({name: found.dense(name) for name in found.kernels}).log_total))
    64
    """
    program = compile_graph(graph, "channel")
    if not program.outputs or not _has_circuit(graph, program):
        return None
    if products == "mean" and any(step.op.output.live and len(step.halves) > 1 for step in program.steps):
        return None
    size = sum(math.prod(kernels.shape[:2]) for kernels in graph.kernels.values())
    dtype = torch.float64 if size < WIDE else torch.float32
    builder = CircuitBuilder(program, pool, dtype)
    for step in program.steps:
        if step.op.output.live:
            builder.add_paths(step)
        if step.needs_presence:
            builder.add_presence(step)
    outputs = [
        (builder.resolve(index), _multiplicities(layout).to(dtype)) for index, layout in program.outputs
    ]
    sources = [(index, value.to(dtype)) for index, value in builder.sources]
    return Circuit(builder.parts, sources, outputs, program.samples, graph.kernels, dtype, builder.presences)


def _has_circuit(graph: ir.ChannelGraph, program: Program) -> bool:
    """Whether one count per kernel is enough, and everything between contractions is a fixed linear map."""
    for step in program.steps:
        op = step.op
        if isinstance(op, ir.Pool) and op.how == "max" and op.window is None and op.dims:
            return False
        is_used = op.output.live or step.needs_presence
        if isinstance(op, ir.Kernel) and is_used and op.weight.name is not None:
            kernels = graph.kernels[op.weight.name]
            if not _positions_are_alike(op, step.layout, program):
                return False
            if not (_is_view(op, kernels) and _taps_are_alike(op, kernels)):
                return False
    return True


def _positions_are_alike(op: ir.Kernel, layout: Layout, program: Program) -> bool:
    """Whether all positions are alike, before and after the op, or each is read by itself."""
    if op.window is None or _is_position_wise(op):
        return True
    rank = len(op.window.kernel)
    uneven = op.window.transposed and any(stride > 1 for stride in op.window.stride)
    before = program.shapes[op.inputs[0].index][-rank:]
    after = layout[-rank:]
    return not uneven and all(size == 1 for size in before) and all(axis.is_collapsed for axis in after)


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
    """Whether the op reads the parameter as a view, so that gradients can be written through it."""
    matrix = torch.zeros(kernels.shape[:2])
    if op.weight.view is None:
        return True
    if kernels.shape[2:]:
        return False
    operand: Tensor = op.weight.view(matrix)
    return operand.dim() == 2 and operand.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()


def _taps_are_alike(op: ir.Kernel, kernels: ir.KernelSet) -> bool:
    """Whether the taps that are live in this use of the parameter are those that are live in any use."""
    if not kernels.shape[2:]:
        return True
    live = torch.ones(kernels.shape[2:], dtype=torch.bool) if op.live_taps is None else op.live_taps
    return torch.equal(live.reshape(kernels.shape[2:]), kernels.live_taps)


def _multiplicities(layout: Layout) -> Tensor:
    """The number of entries of the full tensor that each entry of the reduced tensor stands for, flat."""
    total = torch.ones((), dtype=torch.float64)
    for axis in layout:
        total = total.unsqueeze(-1) * axis.multiplicity().double()
    return total.flatten()
