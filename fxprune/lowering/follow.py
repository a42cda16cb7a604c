"""Follow parameters from the operands of a constant operation into its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.lowering.constant import Constant
from fxprune.lowering.reads import Reads, joined, lost
from fxprune.lowering.rules import movement, norm, pointwise
from fxprune.lowering.rules.table import substitute, tensors_in
from fxprune.torch_private import pytree

__all__ = ["reads_of_result"]


def reads_of_result(
    kind: Any, args: Any, kwargs: Any, run: Callable[[Any, Any], Any], place: int
) -> Reads | None:
    """Find the parameters in one result of an operation on constants.

    Args:
        kind: the function, the method's name or the module's class.
        args, kwargs: of the operation, with constants in place of tensors.
        run: the operation on tensors.
        place: which of the tensors that the operation gives, counted through nested results.

    Returns:
        Labels follow data movement by running it, and elementwise functions by broadcasting; what any other
        operation makes of parameters keeps their names alone. ``None`` if there are none.
    """
    sources = [x for x in tensors_in((args, kwargs)) if isinstance(x, Constant) and x.reads is not None]
    parts = [x.reads for x in sources if x.reads is not None]
    if not parts:
        return None
    operands = list(tensors_in((args, kwargs)))
    if kind in movement.MOVES:
        in_place = isinstance(kind, str) and kind.endswith("_")

        def move(source: int, own: Tensor) -> Tensor:
            if not movement.is_data(sources[source]) and sources[source] is not operands[0]:
                raise TypeError("an index")

            def number(x: ir.Value | Constant) -> Tensor:
                if x is sources[source]:
                    return own.clone() if in_place else own
                known = x.numbers() if isinstance(x, Constant) and not movement.is_data(x) else None
                if isinstance(x, Constant) and x.dtype == torch.bool:
                    if known is None:
                        raise TypeError("a mask that is not known")
                    return known
                # An index that is not known picks entries along its own axes: others are as they are.
                return torch.zeros(x.shape, dtype=torch.int64) if known is None else known.long()

            moved = run(substitute(args, number), substitute(kwargs, number))
            leaf: Tensor = pytree.tree_leaves(moved)[place]
            return leaf

        return joined(parts, move)
    if kind in norm.table.rules:
        return joined(parts, _normed(kind, sources, operands[0]))
    if kind in pointwise.table.rules:
        try:
            shape = torch.broadcast_shapes(*(x.shape for x in operands))  # type: ignore[no-untyped-call]
        except RuntimeError:  # an operand that lends its type alone
            return lost(parts)
        return joined(parts, lambda _, own: own.expand(shape))
    return lost(parts)


def _normed(kind: Any, sources: list[Constant], first: Any) -> Callable[[int, Tensor], Tensor]:
    """A norm of a constant, such as a standardised weight: scales run along axis 1, or the last axes."""

    def change(source: int, own: Tensor) -> Tensor:
        if sources[source] is not first and kind not in norm.OF_LAST_AXES:
            own = own.view(1, -1, *[1] * (len(first.shape) - 2))
        return own.expand(first.shape)

    return change
