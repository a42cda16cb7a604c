"""Give back the channels that statistics count though they go."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxprune.graph import ir
from fxprune.rewrite.compact.constants import Recorded
from fxprune.rewrite.compact.cut import Cut

__all__ = ["give_back_counted"]


def give_back_counted(
    cut: Cut, value: ir.Value, axis: int, nodes: Iterable[fx.Node | None], recorded: Recorded, place: str
) -> bool:
    """Give back the channels of ``value`` along ``axis`` that are not zero in one of ``nodes``.

    False, and nothing is given back, where that cannot be told.
    """
    along = [factor for factor in cut.labels.values.get(value.index, ()) if axis in factor.axes]
    if len(along) != 1:
        return False
    labels = along[0].labels  # along heads, too, where the axis is that of the channels of one
    gone = cut.is_gone(labels)
    hot_ones = torch.zeros_like(gone)
    others = [dim for dim in range(gone.dim()) if dim not in along[0].axes]
    for node in nodes:
        for run in (recorded.get(node.name, ()) if node is not None else ()) or (None,):
            if run is None or run.dim() != gone.dim():
                return False
            hot = (run != 0) & gone
            hot_ones |= hot.amax(others, keepdim=True) if others else hot
    if bool(hot_ones.any()):
        cut.give_back(labels[hot_ones], place)
    return True
