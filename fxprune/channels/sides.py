"""Labels of the rows and columns of a parameter, as a contraction reads it, and of a table's vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fxprune.channels.by_channel import labels_by_weight
from fxprune.channels.labels import FILLED, FIXED, Factor, Labels, Lines, along_axis
from fxprune.channels.orientation import swap_orientation
from fxprune.graph import KernelSet, ir

__all__ = ["ask_for_boxes", "keep_read_tables", "sides_of", "table_factors"]

Because = Callable[[str], str]
"""Adds the place to a reason."""


def sides_of(
    labels: Labels, kernels: Mapping[str, KernelSet], op: ir.Kernel, sizes: tuple[int, int], because: Because
) -> tuple[Tensor, Tensor]:
    """Return the labels of the output and input channels of a contraction, of the given ``sizes``.

    Labelled weights tell them for a view.
    """
    name, (outputs, inputs) = op.weight.name, sizes
    if name is None:
        return torch.full((outputs,), FIXED), torch.full((inputs,), FIXED)
    one = kernels[name]
    rows = labels.rows[name] + torch.arange(one.outputs)
    columns = labels.columns[name] + torch.arange(one.inputs)
    turned = (op.window is not None and op.window.transposed) != one.transposed
    if op.weight.view is None and not (turned and op.window is not None):
        return rows, columns
    if op.weight.view is None and op.groups == 1:
        return columns, rows  # a decoder that reads the encoder's weight, the other way round
    by_row, by_column = (_operand(labels, op, own) for own in labels_by_weight(rows, columns, one))
    # A transposed view has the parameter's columns as its rows.
    for across, along in ((by_row, by_column), (by_column, by_row)):
        top, left = across.amax(1), along.amax(0)
        straight = ((across == top[:, None]) | (across == FILLED)).all()
        if straight and ((along == left) | (along == FILLED)).all() and not op.groups > 1:
            return top, left
    everything = torch.cat([by_row.flatten(), by_column.flatten()])
    labels.fix(everything, because("a view of the parameter that has no rows or columns"))
    return torch.full((outputs,), FIXED), torch.full((inputs,), FIXED)


def _operand(labels: Labels, op: ir.Kernel, own: Tensor) -> Tensor:
    """The labels of a parameter's weights as the contraction reads them: (out, in / groups).

    The taps of one kernel go together, also where each of them is a column of the parameter.
    """
    operand = op.weight.operand(lambda _: own.float()).long()
    if op.window is not None and op.window.transposed:
        operand = swap_orientation(operand, op.groups)
    if operand.dim() == 2:
        return operand
    operand = operand.flatten(2)
    top = operand.amax(2)
    labels.tie(operand, top.unsqueeze(2))
    return top


def table_factors(
    labels: Labels, kernels: Mapping[str, KernelSet], op: ir.Source | ir.Affine, because: Because
) -> Sequence[Factor]:
    """Return the factor of vectors that are looked up in a table; weights that are one keep their rows.

    A vector that numbers are multiplied by is a table with one entry.
    """
    if isinstance(op, ir.Affine):
        return _multiplied(labels, kernels, op)
    use = op.params[0] if op.output.live and len(op.params) == 1 else None
    along = use.axes[-1] if use is not None and not any(use.axes[:-1]) else None
    if use is not None and along is not None and along.index is None and len(along.axes) == 1:
        (axis,), rank = along.axes, len(op.output.shape)
        one = kernels.get(use.name)
        if one is None:
            return [along_axis(axis, labels.of_table(use.name, op.output.shape[axis]), rank)]
        if one.axes is None and not one.transposed and len(one.shape) == 2:
            _hold(labels, one, because, inputs=False)
            return [along_axis(axis, labels.columns[use.name] + torch.arange(one.inputs), rank)]
    if len(op.params) == 1 and (stack := _stack(labels, kernels, op)):
        return stack
    for name in {use.name for use in op.params} & kernels.keys():
        _hold(labels, kernels[name], because)
    return ()


def _stack(labels: Labels, kernels: Mapping[str, KernelSet], op: ir.Source) -> Sequence[Factor]:
    """The factors of matrices side by side, of which others pick some: those of their rows and columns."""
    (use,), rank = op.params, len(op.output.shape)
    one = kernels.get(use.name)
    if one is None or one.axes is None or op.output.live:
        return ()
    sides = []
    for own, first, size in zip(
        one.axes, (labels.rows, labels.columns), (one.outputs, one.inputs), strict=True
    ):
        along = [use.axes[axis] for axis in own]
        places = [x.axes[0] for x in along if x is not None and x.index is None and len(x.axes) == 1]
        sizes = [one.shape[axis] for axis in own]
        if len(places) < len(own) or math.prod(sizes) != size or sorted(places) != places:
            return ()
        shape = [1] * rank
        for place, length in zip(places, sizes, strict=True):
            shape[place] = length
        sides.append(Factor(tuple(places), (first[use.name] + torch.arange(size)).reshape(shape)))
    return sides


def _multiplied(labels: Labels, kernels: Mapping[str, KernelSet], op: ir.Affine) -> Sequence[Factor]:
    """The factor of a parameter along an axis that what it is multiplied by does not have."""
    if op.bias or len(op.params) != 1 or len(op.inputs) != 1 or not op.output.live:
        return ()
    (use,), shape, rank = op.params, op.output.shape, len(op.output.shape)
    own = (1,) * (rank - len(op.inputs[0].shape)) + op.inputs[0].shape
    for along in reversed(use.axes):
        if along is None or along.index is not None or len(along.axes) != 1 or use.name in kernels:
            continue
        axis = along.axes[0]
        if own[axis] == 1 < shape[axis] == len(labels.of_table(use.name, shape[axis])):
            return [along_axis(axis, labels.of_table(use.name, shape[axis]), rank)]
    return ()


def keep_read_tables(
    labels: Labels, kernels: Mapping[str, KernelSet], excluded: Collection[str], entries: Iterable[Tensor]
) -> None:
    """Fix what tables give (``entries``: its labels) and an excluded layer reads.

    No mask cuts the path between the two. To be called when all other ties are known.
    """
    for name in kernels.keys() & set(excluded):
        read = labels.root[labels.columns[name] + torch.arange(kernels[name].inputs)]
        for own in entries:
            labels.fix(own[torch.isin(labels.root[own], read)], f"{name} is excluded, and reads a table")


def _hold(labels: Labels, one: KernelSet, because: Because, *, inputs: bool = True) -> None:
    """Fix the rows, and the columns, of weights that are a table as well, such as tied embeddings."""
    reason = because("a table is read whole")
    labels.fix(labels.rows[one.name] + torch.arange(one.outputs), reason)
    if inputs:
        labels.fix(labels.columns[one.name] + torch.arange(one.inputs), reason)


def ask_for_boxes(labels: Labels, kernels: ir.KernelSet) -> None:
    """Let a parameter with several axes for one side lose whole slices of each."""
    for axes, first in zip(kernels.axes or (), (labels.rows, labels.columns), strict=False):
        if len(axes) > 1:
            sizes = [kernels.shape[axis] for axis in axes]
            entries = first[kernels.name] + torch.arange(math.prod(sizes)).view(sizes)
            labels.lines.append(Lines(entries, -1, kernels.name, box=True))


def column_of(labels: Labels, factor: Factor, axis: int) -> Tensor:
    """Return the labels along a contracted axis: those of other axes fold into one column."""
    lines = factor.labels.movedim(axis, -1)
    lines = lines.reshape(-1, lines.shape[-1])
    first = lines.amax(0)
    labels.tie(lines, first.expand_as(lines))
    return first


def tie_parts(labels: Labels, op: ir.Kernel, rows: Tensor, columns: Tensor, place: str) -> None:
    """Tie the two sides of a depthwise convolution; ask any other for equal numbers in every group."""
    if len(columns) == op.groups:
        labels.tie(columns[:, None], rows.view(op.groups, -1))
        return
    outputs, inputs = rows.view(op.groups, -1), columns.view(op.groups, -1)
    for own, partner, value in ((outputs, inputs, op.output), (inputs, outputs, op.inputs[0])):
        labels.lines.append(Lines(own, value.index, place, partner=partner))
