"""Labels through sums, means, extremes and windows along axes of a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxprune.channels.labels import Factor, Labels
from fxprune.graph import ChannelGraph, ir

__all__ = ["pooled"]


def pooled(
    labels: Labels,
    op: ir.Pool,
    factors: Sequence[Factor],
    graph: ChannelGraph,
    because: Callable[[str], str],
) -> Sequence[Factor]:
    """Fix or tie the labels along the axes that are pooled, and return the factors of the output.

    ``factors``: those of the input. ``because``: adds the place to a reason.
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
        if op.how in ("sum", "mean") and not rest and _offsets(graph, value) == 1:
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


def _offsets(graph: ChannelGraph, value: ir.Value) -> int:
    """Count what keeps the entries of a channel from zero, behind the layer that makes it.

    Such are functions that are not zero at zero, and constants that no mask reaches. Two may make up for each
    other, as in ``exp(x) - 1``.
    """
    op = graph.op_of(value)
    match op:
        case ir.Map():
            return _offsets(graph, op.inputs[0]) + op.floor
        case ir.Affine():
            own = op.bias and all(use.constant for use in op.params)
            return sum(_offsets(graph, each) for each in op.inputs) + own
        case ir.Sum():
            return sum(_offsets(graph, each) for each in op.inputs)
        case ir.Source() if not op.output.live:
            return op.pattern is None and all(use.constant for use in op.params)
        case ir.Gather() if len(op.inputs) == 1:
            return _offsets(graph, op.inputs[0])
        case _:
            return 0
