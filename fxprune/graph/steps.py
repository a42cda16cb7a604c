"""What each op does to reduced tensors: one compile function per op kind.

In: an op, the layouts of its inputs, whether images are periodic. Out: the output's layout and a function of
the reduced inputs. Contraction with ones along a collapsed axis is a multiplication by its size, so the
functions give exactly what the op gives on the full tensors; a periodic image has no border, so that
positions never split there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.layout import (
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

__all__ = [
    "Compiled",
    "Counting",
    "Linear",
    "Setting",
    "compile_linear",
    "folded",
    "total",
]

Counting = Literal["sum", "mean", "any"]


class Setting(Protocol):
    """What a running step asks for: the weights, and how pools count (``any``: entries are 0 or 1)."""

    @property
    def counting(self) -> Counting: ...
    @property
    def constant(self) -> float:
        """What a constant entry is worth: nothing on the track of paths, one on the track of presence."""
        ...

    def operand(self, weight: ir.WeightRef) -> Tensor: ...


Linear = Callable[[Setting, Sequence[Tensor]], Tensor]
Compiled = tuple[Layout, Linear]


def compile_linear(op: ir.Op, layouts: Sequence[Layout], *, periodic: bool) -> Compiled:
    """The function of any op that is linear in its inputs (all but Source, Gate, Mix and Sink)."""
    if isinstance(op, ir.Kernel):
        return _linear(op, layouts[0]) if op.window is None else _conv(op, op.window, layouts[0], periodic)
    if isinstance(op, ir.Sum):
        return _sum(op, layouts)
    if isinstance(op, ir.Gather):
        return _gather(op, layouts, periodic)
    if isinstance(op, ir.Pool):
        return _reduce(op, layouts[0]) if op.window is None else _window(op, op.window, layouts[0], periodic)
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


def _conv(op: ir.Kernel, window: ir.Window, x: Layout, periodic: bool) -> Compiled:
    rank = len(window.kernel)
    alike = all(axis.is_collapsed for axis in x[-rank:])
    bordered = window.transposed or (window.mode == "zeros" and any(p != (0, 0) for p in window.padding))
    uneven = window.transposed and any(stride > 1 for stride in window.stride)
    channels = explicit(op.output.shape[-rank - 1])
    outer = x[: -rank - 1]
    if alike and not uneven and (periodic or not bordered):
        spots = tuple(collapsed(size) for size in op.output.shape[-rank:])
        return (*outer, channels, *spots), _conv_of_constant_image(op, x, rank)
    spots = tuple(explicit(size) for size in op.output.shape[-rank:])
    return (*outer, channels, *spots), _conv_of_image(op, window, x, periodic)


def _weight(op: ir.Kernel, setting: Setting) -> Tensor:
    weight = setting.operand(op.weight)
    return weight if op.live_taps is None else weight * op.live_taps.to(weight)


def _conv_of_constant_image(op: ir.Kernel, x: Layout, rank: int) -> Linear:
    """All positions alike: the taps add up, and the convolution is a product with one number per kernel."""
    read = reader(x, (*x[: -rank - 1], explicit(x[-rank - 1].size), *x[-rank:]))
    shape = (*(axis.count for axis in x[: -rank - 1]), -1, *([1] * rank))
    groups, transposed = op.groups, op.window is not None and op.window.transposed

    def contract(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        weight = _weight(op, setting).flatten(2).sum(2)
        inputs = read(tensors[0]).reshape(-1, groups, tensors_per_group)
        if transposed:
            weight = weight.reshape(groups, -1, weight.shape[1])
        else:
            weight = weight.reshape(groups, -1, weight.shape[1]).transpose(1, 2)
        if groups == 1:
            return (inputs[:, 0] @ weight[0]).reshape(shape)
        return torch.einsum("ngi,gio->ngo", inputs, weight).reshape(shape)

    tensors_per_group = x[-rank - 1].size // groups
    return contract


def _conv_of_image(op: ir.Kernel, window: ir.Window, x: Layout, periodic: bool) -> Linear:
    rank = len(window.kernel)
    fine = (*x[: -rank - 1], *(explicit(axis.size) for axis in x[-rank - 1 :]))
    read, inner = reader(x, fine), reduced_shape(fine)[-rank - 1 :]
    outer, shape = reduced_shape(x[: -rank - 1]), op.output.shape
    run = _transposed if window.transposed else _correlate

    def contract(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        image = read(tensors[0]).reshape(-1, *inner)
        result = run(image, _weight(op, setting), window, op.groups, shape[-rank:], periodic)
        return result.reshape(*outer, *shape[-rank - 1 :])

    return contract


def _correlate(
    image: Tensor, weight: Tensor, window: ir.Window, groups: int, out: Sequence[int], periodic: bool
) -> Tensor:
    rank = len(window.kernel)
    padding: tuple[int, ...] = (0,) * rank
    if periodic or window.mode == "circular":
        for dim, (before, after) in enumerate(window.padding):
            image = _wrapped(image, dim - rank, before, after)
    elif window.mode != "zeros" or any(before != after for before, after in window.padding):
        mode = "constant" if window.mode == "zeros" else window.mode
        image = F.pad(image, [p for pair in reversed(window.padding) for p in pair], mode=mode)
    else:
        padding = tuple(before for before, _ in window.padding)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    result: Tensor = conv(image, weight, None, window.stride, padding, window.dilation, groups)
    return result


def _transposed(
    image: Tensor, weight: Tensor, window: ir.Window, groups: int, out: Sequence[int], periodic: bool
) -> Tensor:
    rank = len(window.kernel)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    if not periodic:
        padding = tuple(before for before, _ in window.padding)
        result: Tensor = conv(
            image, weight, None, window.stride, padding, window.output_padding, groups, window.dilation
        )
        return result
    result = conv(image, weight, None, window.stride, 0, 0, groups, window.dilation)
    for dim, (before, _) in enumerate(window.padding):
        result = folded(result, dim - rank, before, out[dim])
    return result


def _wrapped(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """``x`` extended periodically."""
    if before == after == 0:
        return x
    size = x.shape[dim]
    return x.index_select(dim, torch.arange(-before, size + after, device=x.device) % size)


def folded(x: Tensor, dim: int, before: int, size: int) -> Tensor:
    """``size`` entries from ``before`` on; what lies outside is added periodically."""
    index = (torch.arange(x.shape[dim], device=x.device) - before) % size
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_add(dim, index, x)


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
            moved = _wrapped(moved, dim, before, after)
    else:
        moved = op.move(labels)
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


def _window(op: ir.Pool, window: ir.WindowPool, x: Layout, periodic: bool) -> Compiled:
    out = op.output.shape
    same_rank = len(out) == len(x)
    if same_rank and all(x[dim].is_collapsed for dim in op.dims):
        ones = torch.ones([axis.size if dim in op.dims else 1 for dim, axis in enumerate(x)])
        total, own = window.total(ones), window.own(ones)
        if (
            op.how == "max"
            or periodic
            or bool((total == total.flatten()[0]).all() and (own == own.flatten()[0]).all())
        ):
            layout = tuple(collapsed(out[dim]) if dim in op.dims else axis for dim, axis in enumerate(x))
            means = {"sum": float(total.mean()), "mean": float(own.mean()), "any": 1.0}
            if op.how == "max":
                means = dict.fromkeys(means, 1.0)
            return layout, lambda setting, tensors: tensors[0] * means[setting.counting]
    fine = tuple(explicit(axis.size) if dim in op.dims else axis for dim, axis in enumerate(x))
    read = reader(x, fine)
    layout = tuple(
        x[dim] if dim < len(x) and dim not in op.dims else explicit(size) for dim, size in enumerate(out)
    )
    total_of = window.periodic if periodic and window.periodic is not None else window.total

    def pool(setting: Setting, tensors: Sequence[Tensor]) -> Tensor:
        image = read(tensors[0])
        if setting.counting == "any" or (op.how != "max" and setting.counting == "sum"):
            return total_of(image)
        return window.own(image)

    return layout, pool


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
