"""Find the nodes whose numbers tell what a value holds that only the inside of a function yields."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut

__all__ = ["node_of", "parts_of", "zero_in_parts"]


def node_of(graph: ChannelGraph, value: ir.Value) -> str:
    """Return the name of the first node that yields a value; "" if it is only a part of what nodes yield."""
    return next((output.node for output in graph.nodes_of(value) if not output.path), "")


def parts_of(graph: ChannelGraph, value: ir.Value) -> list[ir.Value]:
    """Return a value that a node yields; of one inside a function, such as a distance, all that it adds up.

    The list is empty if no node yields them either.
    """
    if node_of(graph, value):
        return [value]
    maker = graph.op_of(value)
    if not isinstance(maker, (ir.Sum, ir.Gather)):
        return []
    found = [parts_of(graph, each) for each in maker.inputs]
    return [part for some in found for part in some] if all(found) else []


def zero_in_parts(
    graph: ChannelGraph, cut: Cut, value: ir.Value, recorded: Mapping[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """Mark the groups (bool, by root) whose entries are zero in both runs, in all parts of a value."""
    marks = []
    for part in parts_of(graph, value):
        zero = torch.zeros(cut.labels.count, dtype=torch.bool)
        runs = recorded.get(node_of(graph, part))
        if runs is None or runs[0].shape != torch.Size(part.shape) or runs[0].shape != runs[1].shape:
            return zero
        hot = (runs[0] != 0) | (runs[1] != 0)
        for factor in cut.labels.values.get(part.index, ()):
            others = [axis for axis in range(hot.dim()) if axis not in factor.axes]
            own = hot.amax(others) if others else hot
            roots = cut.labels.root[factor.labels].flatten()
            zero[roots] = True
            zero[roots[own.flatten()]] = False
        marks.append(zero)
    return torch.stack(marks).all(0) if marks else torch.zeros(cut.labels.count, dtype=torch.bool)
