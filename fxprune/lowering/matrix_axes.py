"""Find which axes of a parameter run along the rows, and which along the columns, of a linear map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.graph import ir

__all__ = ["matrix_axes", "merged_axes"]

Axes = tuple[tuple[int, ...], tuple[int, ...]]


def matrix_axes(shape: Sequence[int], ref: ir.WeightRef, *, transposed: bool = False) -> Axes | None:
    """Return the axes along the rows and along the columns of what ``ref`` makes of a parameter.

    All other axes run along neither, as that of the experts in a stack of matrices, or the taps of a
    convolution (``transposed``: its weight has columns first). ``None`` for a matrix or a convolution's
    weight as it is, and where some axis runs along both.

    >>> from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
    >>> heads = ir.WeightRef("w", (6, 4), TensorFunction.of("flatten", PREVIOUS, 0, 1))
    >>> matrix_axes((2, 3, 4), heads)
    ((0, 1), (2,))
    >>> taps_first = ir.WeightRef("w", (6, 4, 3), TensorFunction.of("permute", PREVIOUS, (2, 1, 0)))
    >>> matrix_axes((3, 4, 6), taps_first)
    ((2,), (1,))
    """
    if len(shape) < 3 or ref.view is None:
        return None
    places = torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(tuple(shape))
    entries = ref.operand(lambda _: places).long()
    if transposed:
        entries = entries.transpose(0, 1)
    entries = entries.flatten(2) if entries.dim() > 2 else entries.unsqueeze(2)
    rows, columns = list[int](), list[int]()
    step = 1
    for axis in reversed(range(len(shape))):
        along = torch.div(entries - 1, step, rounding_mode="floor") % shape[axis]
        by_row, by_column, by_tap = (_is_told(along, entries > 0, dims) for dims in ((1, 2), (0, 2), (0, 1)))
        if not by_row and not by_column and not by_tap:
            return None
        if by_row != by_column:
            (rows if by_row else columns).insert(0, axis)
        step *= shape[axis]
    return None if entries.shape[2] > 1 and (rows, columns) == ([0], [1]) else (tuple(rows), tuple(columns))


def _is_told(along: Tensor, present: Tensor, dims: tuple[int, int]) -> bool:
    """Whether entries that are present are equal along ``dims``."""
    high = along.where(present, -1).amax(dims, keepdim=True)
    return bool(((along == high) | ~present).all())


def merged_axes(old: ir.KernelSet | None, new: Axes | None) -> Axes | None:
    """Return the axes that all uses of a parameter agree on; one use may read the matrix transposed."""
    if old is None or old.axes == new:
        return new
    return old.axes if new is not None and old.axes == new[::-1] else None
