"""Tell the output and the input channel of weights, and add weights up by these."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxprune.graph import KernelSet

__all__ = ["any_by_channel", "labels_by_weight", "largest_by_channel", "sums_by_channel"]

PART = 1 << 17
"""Weights that are turned to float64 at a time: as many as stay in a processor's cache."""


def sums_by_channel(
    values: Tensor, kernels: KernelSet, mask: Tensor | None = None, power: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the sums of a parameter's ``values`` over each output and over each input channel.

    Args:
        values: of the parameter's shape; they are added up in float64.
        kernels: the parameter.
        mask: weights that count (bool, of the shape); all, if None.
        power: 1, or 2 for sums of squares.

    Returns:
        Tensors of shape (out,) and (in,), float64, on the CPU.

    >>> from fxprune.capture import capture
    >>> from fxprune.lowering import lower
    >>> graph = lower(capture(torch.nn.Linear(3, 2), torch.ones(1, 3)))
    >>> sums_by_channel(torch.arange(6.0).view(2, 3), graph.kernels["weight"])
    (tensor([ 3., 12.], dtype=torch.float64), tensor([3., 5., 7.], dtype=torch.float64))
    """
    lines, columns = [], torch.zeros(0)
    mask = None if mask is None else kernels.by_axes(mask)
    for part in _parts(kernels.by_axes(values), mask, 0.0):
        part = part.square() if power == 2 else part
        kernel_sums = part.sum(2) if part.shape[2] > 1 else part[..., 0]
        if kernels.groups == 1:
            lines.append(kernel_sums.sum(1))
            own = kernel_sums.sum(0)
            columns = columns + own if len(columns) else own
        else:
            lines.append(kernel_sums)
    first = torch.cat(lines)
    if kernels.groups > 1:
        matrix = first.view(kernels.groups, -1, first.shape[1])
        first, columns = matrix.sum(2).flatten(), matrix.sum(1).flatten()
    return _sides(first, columns, kernels)


def largest_by_channel(
    values: Tensor, kernels: KernelSet, mask: Tensor | None, lowest: float
) -> tuple[Tensor, Tensor]:
    """Return the largest value of each output and each input channel, as `sums_by_channel` does the sums.

    ``lowest``: the value of weights that the mask leaves out.
    """
    mask = None if mask is None else kernels.by_axes(mask)
    matrix = torch.cat([part.amax(2) for part in _parts(kernels.by_axes(values), mask, lowest)])
    return _sides(*_reduced(matrix, kernels), kernels)


def any_by_channel(mask: Tensor, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    """Mark the output and the input channels with any weight that ``mask`` (bool, of the shape) marks."""
    # Arithmetic on bytes is several times faster than on bits.
    marks = kernels.by_axes(mask).contiguous().view(torch.uint8)
    matrix = marks.flatten(2).amax(2) if marks.dim() > 2 else marks
    first, second = _sides(*_reduced(matrix, kernels), kernels)
    return first.bool(), second.bool()


def _parts(values: Tensor, mask: Tensor | None, lowest: float) -> Iterator[Tensor]:
    """Some lines of a parameter at a time, in float64: (lines, other side, taps)."""
    lines = values.detach().flatten(2) if values.dim() > 2 else values.detach().unsqueeze(2)
    number = max(1, PART // max(lines[0].numel(), 1)) if lines.is_cpu else len(lines)
    marks = None if mask is None else mask.reshape(lines.shape)
    for start in range(0, len(lines), number):
        part = lines[start : start + number].double()
        if marks is not None:
            part = part.masked_fill(~marks[start : start + number], lowest)
        yield part


def _reduced(matrix: Tensor, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    parts = matrix.view(kernels.groups, -1, matrix.shape[1])
    return parts.amax(2).flatten(), parts.amax(1).flatten()


def _sides(first: Tensor, second: Tensor, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    """The output side and the input side, of what runs along the parameter's first and second axis."""
    first, second = first.cpu(), second.cpu()
    return (second, first) if kernels.transposed else (first, second)


def labels_by_weight(rows: Tensor, columns: Tensor, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    """The row and the column label of every weight of a parameter, in its own shape."""
    if kernels.axes is not None:
        by_side = (
            labels.view([size if axis in own else 1 for axis, size in enumerate(kernels.shape)])
            for labels, own in zip((rows, columns), kernels.axes, strict=True)
        )
        by_row, by_column = (labels.expand(kernels.shape) for labels in by_side)
        return by_row, by_column
    taps = (1,) * (len(kernels.shape) - 2)
    groups = kernels.groups
    by_row = rows.view(groups, -1, 1).expand(-1, -1, kernels.in_space.size // groups)
    by_column = columns.view(groups, 1, -1).expand_as(by_row)
    if kernels.transposed:
        by_row, by_column = by_row.transpose(1, 2), by_column.transpose(1, 2)
    shape = (*kernels.shape[:2], *taps)
    return by_row.reshape(shape).expand(kernels.shape), by_column.reshape(shape).expand(kernels.shape)
