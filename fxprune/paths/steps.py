"""Compile the ops that are linear in their inputs to functions of reduced tensors.

Each compile function takes an op and the layouts of its inputs, and returns the layout of the output and the
function. The result is exactly what the op gives on the full tensors: a sum along a collapsed axis, for
instance, is a multiplication by the axis's size. A periodic image has no border, so that its positions stay
alike. With borders="inner" the result may be less: taps that reach the border may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import Borders, Compiled, EvalContext
from fxprune.paths.layout import (
    Layout,
    broadcast,
    collapsed,
    explicit,
    full_labels,
    join,
    layout_of_labels,
    reader,
    reduced_shape,
)
from fxprune.paths.windows import conv, pool, wrapped

__all__ = [
    "compile_linear",
    "total",
]


def compile_linear(op: ir.LinearOp, layouts: Sequence[Layout], borders: Borders) -> Compiled:
    """Compile any op but Source, Gate, Mix and Sink."""
    x = layouts[0] if layouts else ()
    match op:
        case ir.Kernel():
            return _linear(op, x) if op.window is None else conv(op, op.window, x, borders)
        case ir.Sum():
            return _sum(op, layouts)
        case ir.Gather():
            return _gather(op, layouts, borders == "periodic")
        case ir.Pool():
            return _reduce(op, x) if op.window is None else pool(op, op.window, x, borders)
        case ir.Opaque():
            return _opaque(op, layouts)
        case ir.Norm() | ir.Affine() | ir.Map():
            return _identity(op, x)
        case _:
            ir.refuse_kind(op)


def _identity(op: ir.Norm | ir.Affine | ir.Map, x: Layout) -> Compiled:
    """Compile a norm, map or scale: entries stay as they are, broadcast to the output's shape."""
    layout = broadcast(x, op.output.shape)
    shape = reduced_shape(layout)
    return layout, lambda context, tensors: tensors[0].reshape(shape)


def _sum(op: ir.Sum, layouts: Sequence[Layout]) -> Compiled:
    """Compile a sum of values."""
    layout = join(layouts, op.output.shape)
    readers = [reader(x, layout) for x in layouts]

    def add(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        total = readers[0](tensors[0])
        for read, tensor in zip(readers[1:], tensors[1:], strict=True):
            total = total + read(tensor)
        return total

    return layout, add


# -- kernels -------------------------------------------------------------------------------------
def _linear(op: ir.Kernel, x: Layout) -> Compiled:
    """Compile a contraction along the last axis."""
    read = reader(x, (*x[:-1], explicit(x[-1].size)))
    layout = (*x[:-1], explicit(op.output.shape[-1]))

    def contract(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        return F.linear(read(tensors[0]), context.operand(op.weight))

    return layout, contract


# -- movement ------------------------------------------------------------------------------------
FIRST = 2
"""The label of the first entry of the inputs. Labels 0 and 1 mark entries that the op fills in: zeros, and
constants."""


def _gather(op: ir.Gather, layouts: Sequence[Layout], periodic: bool) -> Compiled:
    """Compile data movement: run it on labelled entries, and read off where each output entry comes from."""
    labels: list[Tensor] = []
    offset = FIRST
    for x in layouts:
        labels.append(full_labels(x, offset).double())
        offset += math.prod(reduced_shape(x))
    if periodic and op.pads:
        moved = labels[0]
        for dim, before, after in op.pads:
            moved = wrapped(moved, dim, before, after)
    else:
        moved = op.move(*labels)
    layout, reduced = layout_of_labels(moved.long())
    shape, index = tuple(reduced.shape), reduced.flatten()
    if len(layouts) == 1 and torch.equal(index, torch.arange(FIRST, offset)):
        return layout, lambda context, tensors: tensors[0].reshape(shape)

    def gather(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        filled = tensors[0].new_tensor([0.0, context.constant])
        entries = torch.cat([filled, *(tensor.reshape(-1) for tensor in tensors)])
        return entries.index_select(0, index.to(entries.device)).reshape(shape)

    return layout, gather


# -- pools ---------------------------------------------------------------------------------------
def _sum_over(x: Tensor, layout: Layout, dims: Sequence[int]) -> Tensor:
    """Sum over ``dims`` of the full tensor (kept as size one): every class counts as often as it occurs."""
    for dim in dims:
        axis = layout[dim]
        if axis.is_collapsed:
            x = x * axis.size
        elif axis.is_explicit:
            x = x.sum(dim, keepdim=True)
        else:
            shape = [1] * x.dim()
            shape[dim] = axis.count
            x = (x * axis.multiplicity().to(x).reshape(shape)).sum(dim, keepdim=True)
    return x


def _reduce(op: ir.Pool, x: Layout) -> Compiled:
    """Compile a reduction over whole axes."""
    kept = tuple(collapsed(1) if dim in op.dims else axis for dim, axis in enumerate(x))
    layout = kept if op.keepdim else tuple(axis for dim, axis in enumerate(x) if dim not in op.dims)
    shape = reduced_shape(layout)
    entries = math.prod(x[dim].size for dim in op.dims)

    def reduce(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        if op.how == "max" and context.pooling != "any":
            return (tensors[0].amax(op.dims) if op.dims else tensors[0]).reshape(shape)
        total = _sum_over(tensors[0], x, op.dims).reshape(shape)
        return total / entries if op.how == "mean" and context.pooling == "mean" else total

    return layout, reduce


def _opaque(op: ir.Opaque, layouts: Sequence[Layout]) -> Compiled:
    """Compile an unknown op: every entry of every input reaches every entry of the output."""
    layout = tuple(collapsed(size) for size in op.output.shape)

    def spread(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        return total(layouts, tensors).reshape(reduced_shape(layout))

    return layout, spread


def total(layouts: Sequence[Layout], tensors: Sequence[Tensor]) -> Tensor:
    """Sum over all entries of all the full tensors, as a scalar."""
    parts = [
        _sum_over(tensor, layout, range(len(layout))).sum()
        for layout, tensor in zip(layouts, tensors, strict=True)
    ]
    return torch.stack(parts).sum()
