"""Find where entries of several channels are added up: a removed channel counts there unless it is zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxprune.channels.groups import Groups
from fxprune.graph import ir

__all__ = ["added_up", "multiplied", "summed_axes"]


def summed_axes(op: ir.AnyOp) -> list[tuple[ir.Value, tuple[int, ...]]]:
    """Return the operands whose entries ``op`` adds up or compares as they are, each with the axes.

    Those of products of two values, such as queries and keys, of sums, of means and of extremes; not those of
    layers, whose weights may be zero.
    """
    match op:
        case ir.Mix() if op.equation:
            inputs, _, out = op.equation.partition("->")
            letters = inputs.split(",")
            shared = (set(letters[0]) & set(letters[1])) - set(out)
            return [
                (value, tuple(axis for axis, letter in enumerate(own) if letter in shared))
                for value, own in zip(op.inputs, letters, strict=True)
            ]
        case ir.Pool() if (op.how in ("sum", "mean") or op.extreme) and op.window is None:
            return [(op.inputs[0], op.dims)]
        case _:
            return []


def added_up(groups: Groups) -> Tensor:
    """Mark the groups (bool) whose channels are added up with others, or share a statistic with them."""
    found = torch.zeros(groups.count + 1, dtype=torch.bool)  # the last entry: what cannot go
    for op in groups.graph.ops:
        places = [(op.inputs[0], op.axes)] if isinstance(op, ir.Norm) else summed_axes(op)
        for value, axes in places:
            for factor in groups.labels.values.get(value.index, ()):
                if set(factor.axes) & set(axes):
                    found[groups.numbers[factor.labels].flatten()] = True
    return found[:-1]


def multiplied(groups: Groups) -> Iterator[Tensor]:
    """Yield the numbers of the groups along the channels of every operand of a product of two values."""
    for op in groups.graph.ops:
        for value in op.inputs if isinstance(op, ir.Mix) else ():
            for factor in groups.labels.values.get(value.index, ()):
                yield groups.numbers[factor.labels].flatten()
