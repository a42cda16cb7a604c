"""Find where a kernel asks for a number of channels that fills whole steps in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxprune.channels.labels import Labels
from fxprune.graph import ChannelGraph, ir

__all__ = ["multiples"]

STEP = 16
"""Bytes that rows of a grouped matrix product must be a multiple of."""

GROUPED = {
    getattr(room, name) for room, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if hasattr(room, name)
}


def multiples(graph: ChannelGraph, gm: fx.GraphModule, labels: Labels) -> Iterator[tuple[Tensor, int, str]]:
    """Yield labels, of which so many must be left that their number is a multiple, and the node that asks."""
    for node in gm.graph.nodes:
        if node.target not in GROUPED:
            continue
        multiple = max(1, STEP // node.meta["val"].element_size())
        for place in (node, node.args[0]):
            value = graph.results.get(place.name)
            if not isinstance(value, ir.Value):
                continue
            for factor in labels.values.get(value.index, ()):
                if factor.axes == (len(value.shape) - 1,):
                    yield factor.labels.flatten(), multiple, node.name
