"""Sizes that depend on numbers in the input: here they are those of the example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxprune.graph import ir
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import Context, RuleTable, Unknown

__all__ = ["plain_slices", "table"]

table = RuleTable()


@table.rule(torch.arange, torch.linspace, torch.eye, torch.ones, torch.rand, torch.randn, torch.randint)
def constants(context: Context, *args: Any, **kwargs: Any) -> ir.Value:
    """Numbers that no path leads to."""
    return context.build.source(context.shape, live=False)


@table.rule(torch.zeros)
def zeros(context: Context, *args: Any, **kwargs: Any) -> ir.Value:
    """Zeros, to be filled later."""
    pattern = torch.zeros(context.shape, dtype=torch.bool)
    return context.build.source(context.shape, live=False, pattern=pattern)


def plain_slices(index: Any, given: Sequence[int], wanted: Sequence[int]) -> Any:
    """An index in which the bounds of slices are numbers, as ``x[:, :n]``.

    Args:
        index: the index, with values among the bounds.
        given: the shape of what is indexed.
        wanted: the shape of the result.

    Example:
        >>> n = ir.Value(0, (), True)
        >>> plain_slices((slice(None), slice(None, n)), (2, 7), (2, 5))
        (slice(None, None, None), slice(0, 5, None))
    """
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, slice) and _is_live(part) for part in parts):
        return index
    if not all(part is None or part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
        raise Unknown("a slice that depends on the input, beside other indices")
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    found, own, made = [], 0, 0
    for part in parts:
        if part is Ellipsis:
            own, made = own + len(given) - taken, made + len(given) - taken
        elif isinstance(part, slice):
            first = given[own] - wanted[made] if part.stop is None else 0
            found.append(slice(first, first + wanted[made]) if _is_live(part) else part)
            own, made = own + 1, made + 1
            continue
        elif part is None:
            made += 1
        else:
            own += 1
        found.append(part)
    return tuple(found)


def _is_live(part: slice) -> bool:
    return any(isinstance(x, (ir.Value, Constant)) for x in (part.start, part.stop, part.step))
