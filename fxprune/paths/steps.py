"""What each op does to reduced tensors: one compile function per op kind.

In: an op, the layouts of its inputs, whether images are periodic. Out: the output's layout and a function of
the reduced inputs. Contraction with ones along a collapsed axis is a multiplication by its size, so the
functions give exactly what the op gives on the full tensors; a periodic image has no border, so that
positions never split there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.context import Compiled, Setting
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


def compile_linear(op: ir.Op, layouts: Sequence[Layout], *, periodic: bool) -> Compiled:
    """The function of any op that is linear in its inputs (all but Source, Gate, Mix and Sink)."""
    if isinstance(op, ir.Kernel):
        return _linear(op, layouts[0]) if op.window is None else conv(op, op.window, layouts[0], periodic)
    if isinstance(op, ir.Sum):
        return _sum(op, layouts)
    if isinstance(op, ir.Gather):
        return _gather(op, layouts, periodic)
    if isinstance(op, ir.Pool):
        return _reduce(op, layouts[0]) if op.window is None else pool(op, op.window, layouts[0], periodic)
    if isinstance(op, ir.Opaque):
        return _opaque(op, layouts)
    return _same(op, layouts[0])


def _same(op: ir.Op, x: Layout) -> Compiled:
    """Norms, maps, scales: entries stay what they are, broadcast to the output's shape."""
    layout = broadcast(x, op.output.shape)
    shape = reduced_shape(layout)
    return layout, lambda setting, tensors: tensors[0].reshape(shape)


def _sum(op: ir.Sum, layouts: Sequence[Layout]) -> Compiled:
    layout = join(layouts, op.output.shape)
    readers = [reader(x, layout) for x in layouts]

    def add(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        total = readers[0](tensors[0])
        for read, tensor in zip(readers[1:], tensors[1:], strict=True):
            total = total + read(tensor)
        return total

    return layout, add


# -- kernels -------------------------------------------------------------------------------------
def _linear(op: ir.Kernel, x: Layout) -> Compiled:
    read = reader(x, (*x[:-1], explicit(x[-1].size)))
    layout = (*x[:-1], explicit(op.output.shape[-1]))

    def contract(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        return F.linear(read(tensors[0]), setting.operand(op.weight))

    return layout, contract


# -- movement ------------------------------------------------------------------------------------
ZERO, PRESENT = 0, 1  # labels of filled-in entries; those of the inputs' entries follow


def _gather(op: ir.Gather, layouts: Sequence[Layout], periodic: bool) -> Compiled:
    labels: list[Tensor] = []
    offset = PRESENT + 1
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
    first = PRESENT + 1
    if len(layouts) == 1 and torch.equal(index, torch.arange(first, offset)):
        return layout, lambda setting, tensors: tensors[0].reshape(shape)

    def gather(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        filled = tensors[0].new_tensor([0.0, setting.constant])
        entries = torch.cat([filled, *(tensor.reshape(-1) for tensor in tensors)])
        return entries.index_select(0, index.to(entries.device)).reshape(shape)

    return layout, gather


# -- pools ---------------------------------------------------------------------------------------
def _counted(x: Tensor, layout: Layout, dims: Sequence[int]) -> Tensor:
    """Sum over ``dims`` (kept as size one), every class as often as it occurs."""
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
    kept = tuple(collapsed(1) if dim in op.dims else axis for dim, axis in enumerate(x))
    layout = kept if op.keepdim else tuple(axis for dim, axis in enumerate(x) if dim not in op.dims)
    shape = reduced_shape(layout)
    entries = math.prod(x[dim].size for dim in op.dims)

    def reduce(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        if op.how == "max" and setting.counting != "any":
            return (tensors[0].amax(op.dims) if op.dims else tensors[0]).reshape(shape)
        total = _counted(tensors[0], x, op.dims).reshape(shape)
        return total / entries if op.how == "mean" and setting.counting == "mean" else total

    return layout, reduce


def _opaque(op: ir.Opaque, layouts: Sequence[Layout]) -> Compiled:
    """Every entry of every input reaches every entry of the output."""
    layout = tuple(collapsed(size) for size in op.output.shape)

    def spread(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        return total(layouts, tensors).reshape(reduced_shape(layout))

    return layout, spread


def total(layouts: Sequence[Layout], tensors: Sequence[Tensor]) -> Tensor:
    """Sum over all entries of all the (full) tensors: a number."""
    parts = [
        _counted(tensor, layout, range(len(layout))).sum()
        for layout, tensor in zip(layouts, tensors, strict=True)
    ]
    return torch.stack(parts).sum()
