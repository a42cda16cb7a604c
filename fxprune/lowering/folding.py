"""Make constants of the results of calls that depend on no input."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.reads import Reads, overwritten
from fxprune.lowering.rules.table import substitute

__all__ = ["as_constants", "changed", "reads_after_write"]


def changed(evaluate: Callable[[], Any], index: Any, new: Any) -> Callable[[], Any]:
    """Compute a constant after ``x[index] = new``."""

    @functools.cache
    def written() -> Any:
        def numbers(x: ir.Value | Constant) -> Any:
            return x.evaluate() if isinstance(x, Constant) else x

        result = evaluate().clone()
        result[substitute(index, numbers)] = substitute(new, numbers)
        return result

    return written


def reads_after_write(x: Constant, index: Any, new: Any) -> Reads | None:
    """Find the parameters in a constant after ``x[index] = new``."""

    def write(old: Tensor, entries: Tensor) -> Tensor:
        constant = Constant(tuple(entries.shape), entries.dtype, lambda: entries)
        result: Tensor = changed(lambda: old, index, constant)()
        return result

    return overwritten(x.reads, new.reads if isinstance(new, Constant) else None, write, x.shape)


def as_constants(
    result: Any,
    evaluate: Callable[[], Any],
    view: TensorFunction | None,
    constant: Callable[[Tensor, Callable[[], Any], TensorFunction | None], Constant],
) -> Any:
    """A constant for every tensor of a result; ``view`` gives the whole result from a parameter."""
    if isinstance(result, Tensor):
        return constant(result, evaluate, view)
    if isinstance(result, (list, tuple)):
        items = [
            as_constants(
                item,
                lambda i=i: evaluate()[i],  # type: ignore[misc]
                None if view is None else view.then(operator.getitem, PREVIOUS, i),
                constant,
            )
            for i, item in enumerate(result)
        ]
        return type(result)(items) if type(result) in (list, tuple) else tuple(items)
    return result
