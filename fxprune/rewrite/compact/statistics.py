"""Find the nodes of norms written by hand that add up channels, and what these hold of channels that go.

Where all that is added up is zero in the channels that go, sums stay what they are, and means need a factor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.constants import Recorded
from fxprune.rewrite.compact.cut import Cut

__all__ = ["keep_what_statistics_count", "node_of", "reductions"]

REDUCTIONS = frozenset(("mean", "sum", "norm", "vector_norm"))
POINTWISE = frozenset(
    (
        "add", "sub", "rsub", "mul", "truediv", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg",
        "abs", "clamp", "clamp_min", "maximum", "minimum", "float", "double", "to", "type_as", "contiguous",
        "multiply",
    )
)  # fmt: skip


def node_of(graph: ChannelGraph, value: ir.Value) -> str:
    """Return the name of the first node that yields a value; "" if it is only a part of what nodes yield."""
    return next((output.node for output in graph.nodes_of(value) if not output.path), "")


def reductions(
    graph: ChannelGraph, op: ir.Norm, nodes: Mapping[str, fx.Node], axis: int
) -> list[fx.Node] | None:
    """Return the nodes between what ``op`` reads and its own that add up entries along ``axis``.

    ``None`` if a node between the two is of a kind that is not known here, or has other axes.
    """
    node = nodes[op.node]
    order = {each: place for place, each in enumerate(node.graph.nodes)}
    names = [output.node for output in graph.nodes_of(op.inputs[0]) if not output.path]
    before = [nodes[name] for name in names if name in nodes and order[nodes[name]] < order[node]]
    if not before:
        return None
    source = max(before, key=order.__getitem__)  # an activation yields the value that it reads
    between: list[fx.Node] = []
    waiting, seen = [node], {node}
    while waiting:
        each = waiting.pop()
        between.append(each)
        for near in each.all_input_nodes:
            if near not in seen and near is not source and order[near] > order[source]:
                seen.add(near)
                waiting.append(near)
    depends = {source}
    found = []
    for each in sorted(between, key=order.__getitem__):
        if not depends & set(each.all_input_nodes):
            continue
        depends.add(each)
        name, first = getattr(each.target, "__name__", each.target), each.args[0] if each.args else None
        known = name in REDUCTIONS or name in POINTWISE
        if each.op == "call_module" or not known or _rank(each) != _rank(source):
            return None
        if name in REDUCTIONS and isinstance(first, fx.Node):
            if first.meta["val"].shape[axis] != each.meta["val"].shape[axis]:
                found.append(each)
    return found


def keep_what_statistics_count(
    graph: ChannelGraph, op: ir.Norm, axis: int, nodes: Mapping[str, fx.Node], cut: Cut, recorded: Recorded
) -> bool:
    """Give back the channels that a norm counts though they go; False if that cannot be told."""
    value = op.inputs[0]
    found = reductions(graph, op, nodes, axis)
    along = [factor for factor in cut.labels.values[value.index] if axis in factor.axes]
    if not found or len(along) != 1:
        return False
    labels = along[0].labels  # along heads, too, where the axis is that of the channels of one
    gone = cut.is_gone(labels)
    counted = torch.zeros_like(gone)
    others = [place for place in range(gone.dim()) if place not in along[0].axes]
    for node in found:
        for run in recorded.get(node.all_input_nodes[0].name, ()) or (None,):
            if run is None or run.dim() != gone.dim():
                return False
            hot = (run != 0) & gone
            counted |= hot.amax(others, keepdim=True) if others else hot
    if bool(counted.any()):
        cut.give_back(labels[counted], f"{op.layer or op.node}: a statistic over channels")
    return True


def _rank(node: fx.Node) -> int:
    val = node.meta.get("val")
    return val.dim() if isinstance(val, Tensor) else -1
