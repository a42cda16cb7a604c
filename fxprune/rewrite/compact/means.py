"""Let means over channels of which some are gone give what they gave: those that went were zero."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from torch import fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.norms import kind_of
from fxprune.rewrite.compact.statistics import reductions

__all__ = ["scale_means"]


def scale_means(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut) -> None:
    """Multiply means over fewer entries by the share that is left, in place."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for op in graph.ops:
        if isinstance(op, ir.Norm) and op.node in nodes and kind_of(nodes[op.node]) == "":
            _scale_statistics(graph, op, nodes, cut)
        if not isinstance(op, ir.Pool) or op.how != "mean" or op.window is not None or not op.output.live:
            continue
        share = _share(cut, op.inputs[0], op.dims)
        if share == 1.0:
            continue
        node = nodes[op.node]
        if op.inner or getattr(node.target, "__name__", node.target) != "mean":
            raise UnevenCut(f"{op.layer or op.node}: a mean over channels", cut.labels_of(op.inputs[0]))
        _scale(node, share)


def _scale_statistics(graph: ChannelGraph, op: ir.Norm, nodes: dict[str, fx.Node], cut: Cut) -> None:
    """Scale the means in a norm that is written by hand."""
    value = op.inputs[0]
    for axis in op.axes:
        share = _share(cut, value, (axis,))
        if share == 1.0:
            continue
        for node in reductions(graph, op, nodes, axis) or ():
            if getattr(node.target, "__name__", node.target) == "mean":
                _scale(node, share)


def _share(cut: Cut, value: ir.Value, dims: Sequence[int]) -> float:
    """The share of the entries along ``dims`` that is left."""
    if not cut.touches(value):
        return 1.0
    left = math.prod(cut.shape(value)[axis] for axis in dims)
    return left / math.prod(value.shape[axis] for axis in dims)


def _scale(node: fx.Node, share: float) -> None:
    with node.graph.inserting_after(node):
        scaled = node.graph.create_node(
            "call_function", operator.mul, (node, share), {}, name=f"narrowed_{node.name}"
        )
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
