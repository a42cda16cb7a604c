"""Sampling of images at places that the network computes: any position of a channel may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.choices import any_along
from fxprune.lowering.rules.table import Context, RuleTable, Unknown
from fxprune.lowering.rules.weighted import operand

__all__ = ["table"]

table = RuleTable()


def _scaled_by(context: Context, sampled: ir.Value, places: Any, shape: Sequence[int]) -> ir.Value:
    """Multiply what was sampled with numbers that are never Zero: the places say how much of each entry."""
    if not isinstance(places, ir.Value):
        return sampled
    return context.build.gate(sampled, context.build.map(places, floor=True), shape)


@table.rule(F.grid_sample, torch.grid_sampler)
def grid_sample(context: Context, x: Any, grid: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y[n, c, p] = x[n, c, near grid[n, p]]``: any position of the channel, weighted by the grid."""
    build, shape = context.build, context.shape
    sampled = any_along(context, x, range(2, len(shape)), shape)
    if isinstance(grid, ir.Value):
        one = (shape[0], *shape[2:])
        grid = _sum_of_each(context, grid, len(grid.shape) - 1, one)
        grid = build.gather(TensorFunction.of("unsqueeze", PREVIOUS, 1), [grid], (shape[0], 1, *shape[2:]))
    return _scaled_by(context, sampled, grid, shape)


def _sum_of_each(context: Context, x: ir.Value, axis: int, shape: Sequence[int]) -> ir.Value:
    """The sum along an axis of which each entry is read by itself, so that none of them may go."""
    picks = [TensorFunction.of("select", PREVIOUS, axis, place) for place in range(x.shape[axis])]
    return context.build.sum([context.build.gather(pick, [x], shape) for pick in picks], shape)


@table.rule(F.affine_grid)
def affine_grid(context: Context, theta: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y[n, p, i] = sum_j base[p, j] theta[n, i, j]``: each number of a row reaches every position."""
    build, shape = context.build, context.shape
    value = build.materialise(theta)
    rows = _sum_of_each(context, value, 2, value.shape[:2])
    spread = (shape[0], *[1] * (len(shape) - 2), shape[-1])
    rows = build.gather(TensorFunction.of("reshape", PREVIOUS, spread), [rows], spread)
    return build.affine(rows, shape)


@table.rule("torchvision.roi_align", "torchvision.roi_pool")
def region(context: Context, x: Any, boxes: Any, *args: Any, **kwargs: Any) -> Any:
    """Each cell of a box may read any position of any sample; boxes choose, and carry no path."""
    result = context.result
    pooled = result if isinstance(result, torch.Tensor) else result[0]
    value = context.build.materialise(x)
    one = (1, value.shape[1], 1, 1)
    value = context.build.affine(context.build.reduce(value, "max", (0, 2, 3), True, one), pooled.shape)
    if isinstance(result, torch.Tensor):
        return value
    return (value, context.build.source(result[1].shape, live=False))


@table.rule("torchvision.deform_conv2d")
def deform_conv2d(
    context: Context, x: Any, weight: Any, offset: Any, mask: Any, bias: Any, *numbers: Any
) -> ir.Value:
    """A convolution whose taps read any position of their channel: taps side by side, then a stride of one
    kernel.
    """
    build, shape = context.build, context.shape
    ref = operand(weight)
    groups, parts, use_mask = int(numbers[6]), int(numbers[7]), bool(numbers[8])
    if parts != 1:
        raise Unknown("deformable convolution with groups of offsets")
    samples, _, height, width = shape
    rows, columns = ref.shape[2:]
    size = (samples, groups * ref.shape[1], height * rows, width * columns)

    def beside(value: ir.Value, each: int) -> ir.Value:
        """``each`` numbers for every tap and position, as one image with the taps side by side."""
        cut = (samples, rows, columns, each, height, width)
        move = TensorFunction.of("reshape", PREVIOUS, cut).then("permute", PREVIOUS, (0, 3, 4, 1, 5, 2))
        move = move.then("reshape", PREVIOUS, (samples, each, *size[2:]))
        value = build.gather(move, [value], (samples, each, *size[2:]))
        return build.reduce(value, "sum", (1,), True, (samples, 1, *size[2:]))

    taps = any_along(context, x, (2, 3), size)
    if isinstance(offset, ir.Value):
        taps = _scaled_by(context, taps, beside(offset, 2), size)
    if use_mask and isinstance(mask, ir.Value):
        taps = build.gate(taps, beside(mask, 1), size)
    window = ir.Window((rows, columns), (rows, columns), ((0, 0), (0, 0)), (1, 1))
    given = bias if isinstance(bias, Constant) and not bias.zero else None
    return build.conv(taps, ref, shape, window=window, groups=groups, bias=given, by=weight)


@table.rule(F.max_pool2d_with_indices, F.max_pool1d_with_indices, F.max_pool3d_with_indices)
def max_pool_with_places(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest entry of each window, and its place, which carries no path."""
    pooled, places = context.result
    rank = (F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices).index(
        context.target
    ) + 1
    dims = range(len(pooled.shape) - rank, len(pooled.shape))
    return any_along(context, x, dims, pooled.shape), context.build.source(places.shape, live=False)


@table.rule(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
def max_unpool(context: Context, x: Any, places: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """Entries go to places of their channel that the input decides."""
    shape = context.shape
    rank = (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d).index(context.target) + 1
    return any_along(context, x, range(len(shape) - rank, len(shape)), shape)
