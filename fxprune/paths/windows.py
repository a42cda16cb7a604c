"""Compile convolutions and pools, so that they run on no more positions than differ.

Positions that are all alike stay one class if no window reaches over a border. Otherwise a stretch of equal
positions is shortened, and the op runs on the smaller image with its own padding. Every output of the large
image is an output of the small one, so nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.graph import ir
from fxprune.lowering.periodic import fold_periodically
from fxprune.paths.context import Borders, Compiled, EvalContext, LinearMap, Pooling
from fxprune.paths.layout import AxisMap, Layout, collapsed, explicit, reader, reduced_shape

__all__ = ["conv", "pool", "shortened", "wrapped"]


def shortened(axis: AxisMap, out: int, span: int, stride: int, before: int) -> tuple[Tensor, AxisMap]:
    """Shorten an axis over which windows of ``span`` entries slide.

    ``before`` zeros stand in front of the axis, ``out`` is the number of windows. Windows that lie inside the
    longest stretch of equal entries are all alike; one of them is enough. Returns the positions to keep, and
    the map of the output axis.

    >>> shortened(collapsed(8), 8, 3, 1, 1)[0], shortened(collapsed(8), 8, 3, 1, 1)[1].index()
    (tensor([5, 6, 7]), tensor([0, 1, 1, 1, 1, 1, 1, 2]))
    """
    start, stop = _longest_stretch(axis)
    first_inside = max(0, -(-(start + before) // stride))
    last_inside = min(out - 1, (stop - span + before) // stride)
    spare = last_inside - first_inside
    if spare <= 0:
        return torch.arange(axis.size), explicit(out)
    kept = torch.arange(axis.size - spare * stride)
    kept = torch.where(kept < start, kept, kept + spare * stride)
    windows = torch.arange(out)
    labels = torch.where(windows <= first_inside, windows, (windows - spare).clamp(min=first_inside))
    count = out - spare
    return kept, AxisMap(out, count, labels if count > 1 else None)


def _longest_stretch(axis: AxisMap) -> tuple[int, int]:
    """Return where the longest run of entries of one class starts and stops."""
    classes = axis.index()
    edges = torch.nonzero(classes[1:] != classes[:-1]).flatten() + 1
    starts = torch.cat([edges.new_zeros(1), edges])
    lengths = torch.diff(starts, append=edges.new_tensor([axis.size]))
    longest = int(lengths.argmax())
    return int(starts[longest]), int(starts[longest] + lengths[longest])


def _position_reader(x: Layout, positions: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """Function that reads a reduced tensor at the given positions of some axes."""
    picks = {dim: x[dim].index()[at] for dim, at in positions.items()}
    picks = {dim: at for dim, at in picks.items() if not torch.equal(at, torch.arange(x[dim].count))}

    def pick(tensor: Tensor) -> Tensor:
        for dim, at in picks.items():
            tensor = tensor.index_select(dim, at.to(tensor.device))
        return tensor

    return pick


# -- convolutions -----------------------------------------------------------------------------------
def conv(op: ir.Kernel, window: ir.Window, x: Layout, borders: Borders) -> Compiled:
    """Compile a convolution of any rank, transposed or not."""
    rank, periodic = len(window.kernel), borders == "periodic"
    sizes = op.output.shape[-rank:]
    outer = (*x[: -rank - 1], explicit(op.output.shape[-rank - 1]))
    if all(axis.is_collapsed for axis in x[-rank:]):
        constant = (*outer, *map(collapsed, sizes))
        if _keeps_constant(op, window, x, periodic):
            return constant, _conv_of_constant_image(op, x, rank)
        taps = _inner_taps(window, [axis.size for axis in x[-rank:]], sizes) if borders == "inner" else None
        if taps is not None:
            return constant, _conv_of_constant_image(op, x, rank, taps)
    may_shorten = not periodic and not window.transposed and window.mode == "zeros"
    positions, axes = {}, []
    for d, (axis, out) in enumerate(zip(x[-rank:], sizes, strict=True)):
        kept, map_out = torch.arange(axis.size), explicit(out)
        if window.keeps_positions:
            kept, map_out = axis.representatives(), axis
        elif may_shorten:
            span = window.dilation[d] * (window.kernel[d] - 1) + 1
            kept, map_out = shortened(axis, out, span, window.stride[d], window.padding[d][0])
        positions[len(x) + d - rank] = kept
        axes.append(map_out)
    return (*outer, *axes), _conv_of_image(op, window, x, (positions, tuple(axes)), periodic)


def _keeps_constant(op: ir.Kernel, window: ir.Window, x: Layout, periodic: bool) -> bool:
    """Whether the convolution of a constant image is a constant image."""
    if not window.transposed:
        return periodic or window.mode != "zeros" or all(p == (0, 0) for p in window.padding)
    rank = len(window.kernel)
    is_same_size = all(op.output.shape[d - rank] == x[d - rank].size for d in range(rank))
    return periodic and is_same_size and all(stride == 1 for stride in window.stride)


def _live_weight(op: ir.Kernel, context: EvalContext) -> Tensor:
    """The op's weight, with zeros at the taps that only ever see padding."""
    weight = context.operand(op.weight)
    return weight if op.live_taps is None else weight * op.live_taps.to(weight)


def _inner_taps(window: ir.Window, before: Sequence[int], after: Sequence[int]) -> tuple[slice, ...] | None:
    """Return the taps that lie inside of an image at all positions, by axis; None if there are none.

    ``before``, ``after``: the sizes of the image and of the result.

    >>> _inner_taps(ir.Window((3,), (1,), ((1, 1),), (1,)), [8], [8])
    (slice(1, 2, None),)
    """
    if window.transposed:
        return None
    taps = []
    for d, (size, out) in enumerate(zip(before, after, strict=True)):
        first = [tap * window.dilation[d] - window.padding[d][0] for tap in range(window.kernel[d])]
        last = (out - 1) * window.stride[d]
        inside = [tap for tap, place in enumerate(first) if place >= 0 and place + last < size]
        if not inside:
            return None
        taps.append(slice(inside[0], inside[-1] + 1))
    return tuple(taps)


def _conv_of_constant_image(
    op: ir.Kernel, x: Layout, rank: int, taps: tuple[slice, ...] | None = None
) -> LinearMap:
    """Convolve an image of equal positions: taps, or only ``taps``, add up; a matrix product is left."""
    read = reader(x, (*x[: -rank - 1], explicit(x[-rank - 1].size), *x[-rank:]))
    index = (slice(None), slice(None), *(taps or ()))
    shape = (*(axis.count for axis in x[: -rank - 1]), -1, *([1] * rank))
    groups, transposed = op.groups, op.window is not None and op.window.transposed
    inputs_per_group = x[-rank - 1].size // groups

    def contract(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        weight = _live_weight(op, context) if taps is None else context.operand(op.weight)[index]
        weight = weight.reshape(*weight.shape[:2], -1)
        weight = weight.sum(2) if weight.shape[2] > 1 else weight[..., 0]
        inputs = read(tensors[0]).reshape(-1, groups, inputs_per_group)
        if transposed:
            weight = weight.reshape(groups, -1, weight.shape[1])
        else:
            weight = weight.reshape(groups, -1, weight.shape[1]).transpose(1, 2)
        if groups == 1:
            return (inputs[:, 0] @ weight[0]).reshape(shape)
        return torch.einsum("ngi,gio->ngo", inputs, weight).reshape(shape)

    return contract


def _conv_of_image(
    op: ir.Kernel,
    window: ir.Window,
    x: Layout,
    places: tuple[dict[int, Tensor], Layout],
    periodic: bool,
) -> LinearMap:
    """The convolution itself, on the positions to keep; ``places``: these, and the output's axes."""
    positions, axes = places
    rank = len(window.kernel)
    fine = (*x[: -rank - 1], explicit(x[-rank - 1].size), *x[-rank:])
    read, pick = reader(x, fine), _position_reader(x, positions)
    outer, inner = reduced_shape(x[: -rank - 1]), (x[-rank - 1].size, *map(len, positions.values()))
    shape = (*outer, op.output.shape[-rank - 1], *reduced_shape(axes))
    run = _transposed if window.transposed else _correlate

    def contract(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        image = pick(read(tensors[0])).reshape(-1, *inner)
        return run(image, _live_weight(op, context), window, op.groups, shape[-rank:], periodic).reshape(
            shape
        )

    return contract


def _correlate(
    image: Tensor, weight: Tensor, window: ir.Window, groups: int, out: Sequence[int], periodic: bool
) -> Tensor:
    """A convolution, without a bias."""
    rank = len(window.kernel)
    padding: tuple[int, ...] = (0,) * rank
    if window.mode == "circular" or (periodic and window.mode == "zeros"):
        for dim, (before, after) in enumerate(window.padding):
            image = wrapped(image, dim - rank, before, after)
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
    """A transposed convolution, without a bias; a periodic image folds back what leaves it."""
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
        result = fold_periodically(result, dim - rank, before, out[dim])
    return result


def wrapped(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Extend an axis periodically, by ``before`` and ``after`` entries."""
    if before == after == 0:
        return x
    size = x.shape[dim]
    return x.index_select(dim, torch.arange(-before, size + after, device=x.device) % size)


# -- pools ------------------------------------------------------------------------------------------
def pool(op: ir.Pool, window: ir.WindowPool, x: Layout, borders: Borders) -> Compiled:
    """Compile pooling, resampling, and anything else that adds up positions."""
    out, periodic = op.output.shape, borders == "periodic"
    if len(out) == len(x) and all(x[dim].is_collapsed for dim in op.dims):
        gains = _even_gains(op, window, x, borders)
        if gains is not None:
            layout = tuple(collapsed(out[dim]) if dim in op.dims else axis for dim, axis in enumerate(x))
            return layout, lambda context, tensors: tensors[0] * gains[context.pooling]
    total = window.periodic if periodic and window.periodic is not None else window.total
    positions: dict[int, Tensor] = {}
    axes = [x[dim] if dim < len(x) and dim not in op.dims else explicit(size) for dim, size in enumerate(out)]
    for d, dim in enumerate(op.dims):
        positions[dim] = torch.arange(x[dim].size)
        geometry = window.window
        if geometry is not None and not periodic:
            span = geometry.dilation[d] * (geometry.kernel[d] - 1) + 1
            before = geometry.padding[d][0]
            positions[dim], axes[dim] = shortened(x[dim], out[dim], span, geometry.stride[d], before)
    pick = _position_reader(x, positions)

    def run(context: EvalContext, tensors: Sequence[Tensor]) -> Tensor:
        sums = context.pooling == "any" or (op.how != "max" and context.pooling == "sum")
        result: Tensor = (total if sums else window.own)(pick(tensors[0]))
        return result

    return tuple(axes), run


def _even_gains(
    op: ir.Pool, window: ir.WindowPool, x: Layout, borders: Borders
) -> dict[Pooling, float] | None:
    """Pool an image of ones in each mode; return None if the result differs between positions."""
    if op.how == "max":
        return {"sum": 1.0, "mean": 1.0, "any": 1.0}
    ones = torch.ones([axis.size if dim in op.dims else 1 for dim, axis in enumerate(x)])
    total, own = window.total(ones).flatten(), window.own(ones).flatten()
    if borders == "periodic" or bool((total == total[0]).all() and (own == own[0]).all()):
        return {"sum": float(total.mean()), "mean": float(own.mean()), "any": 1.0}
    if borders == "inner" and bool((total > 0).all()):
        return {"sum": float(total.min()), "mean": float(own.min()), "any": 1.0}
    return None
