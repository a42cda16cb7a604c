"""Labels through sums, means, extremes and windows along axes of a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxprune.channels.labels import Factor, Labels
from fxprune.graph import ir

__all__ = ["pooled"]


def pooled(
    labels: Labels,
    op: ir.Pool,
    factors: Sequence[Factor],
    never_zero: bool,
    because: Callable[[str], str],
) -> Sequence[Factor]:
    """Fix or tie the labels along the axes that are pooled, and return the factors of the output.

    ``factors``: those of the input. ``never_zero``: a channel of it is not zero without weights. ``because``:
    adds the place to a reason.
    """
    value, found = op.inputs[0], []
    for factor in factors:
        if not set(factor.axes) & set(op.dims):
            found.append(factor)
            continue
        rest = tuple(axis for axis in factor.axes if axis not in op.dims)
        if op.window is not None or (op.how == "max" and not rest and not op.extreme):
            reason = f"{'a window' if op.window is not None else op.how} over channels"
            labels.fix(factor.labels, because(reason))
            continue
        if op.how in ("sum", "mean") and not rest and never_zero:
            labels.fix(factor.labels, because(f"a {op.how} over channels that are not zero without weights"))
            continue
        left = factor.labels
        for axis in op.dims:
            top = left.amax(axis, keepdim=True)
            if rest:
                labels.tie(left, top)
            left = top
        if rest:
            found.append(Factor(rest, left))
    if op.window is not None:
        return [factor for factor in found if factor.labels.dim() == len(op.output.shape)]
    if op.keepdim:
        return found
    kept = [axis for axis in range(len(value.shape)) if axis not in op.dims]
    place = {axis: number for number, axis in enumerate(kept)}
    return [
        Factor(
            tuple(place[axis] for axis in factor.axes),
            factor.labels.reshape([factor.labels.shape[axis] for axis in kept]),
        )
        for factor in found
    ]
