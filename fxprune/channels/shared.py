"""Let the channels go together that a layer without kernels is called on: a norm of two branches, say."""

from __future__ import annotations

from torch import Tensor

from fxprune.channels.labels import Labels
from fxprune.graph import ChannelGraph, ir
from fxprune.graph.params import AxisUse

__all__ = ["tie_shared"]


def tie_shared(labels: Labels, graph: ChannelGraph) -> None:
    """Tie the labels along each axis of a parameter or buffer of a norm or layer that is called again.

    Kernels are tied already. What one of the calls reads as a whole stays in all of them. Parameters that
    code reads by itself are picked by entry in each place, and need not be tied.
    """
    uses: dict[tuple[str, int], list[AxisUse]] = {}
    for op in graph.ops:
        for use in op.params:
            for axis, along in enumerate(use.axes):
                own = isinstance(op, ir.Norm) or (op.layer and use.name.startswith(f"{op.layer}."))
                if along is not None and own and use.name not in graph.kernels:
                    uses.setdefault((use.name, axis), []).append(along)
    for (name, _), places in uses.items():
        if len(places) < 2 or any(place.index is not None or len(place.axes) != 1 for place in places):
            continue
        found = [_along(labels, place) for place in places]
        known = [one for one in found if one is not None]
        if any(len(one) != len(known[0]) for one in known):
            continue
        for one in known:
            if len(known) < len(found):
                labels.fix(one, f"{name} is read whole elsewhere")
            else:
                labels.tie(one, known[0])


def _along(labels: Labels, use: AxisUse) -> Tensor | None:
    """The labels of what an axis of a parameter meets; None if it has none."""
    factors = [factor for factor in labels.values.get(use.value, ()) if factor.axes == use.axes]
    return factors[0].labels.flatten() if factors else None
