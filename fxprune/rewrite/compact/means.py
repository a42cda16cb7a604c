"""Let means over channels of which some are gone give what they gave: those that went were zero."""

from __future__ import annotations

import math
import operator

from torch import fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut, UnevenCut

__all__ = ["scale_means"]


def scale_means(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut) -> None:
    """Multiply means over fewer entries by the share that is left, in place."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for op in graph.ops:
        if not isinstance(op, ir.Pool) or op.how != "mean" or op.window is not None or not op.output.live:
            continue
        value = op.inputs[0]
        if not cut.touches(value):
            continue
        left = math.prod(cut.shape(value)[axis] for axis in op.dims)
        whole = math.prod(value.shape[axis] for axis in op.dims)
        if left == whole:
            continue
        node = nodes[op.node]
        if op.inner or getattr(node.target, "__name__", node.target) != "mean":
            raise UnevenCut(f"{op.layer or op.node}: a mean over channels", cut.labels_of(value))
        with gm.graph.inserting_after(node):
            scaled = gm.graph.create_node(
                "call_function", operator.mul, (node, left / whole), {}, name=f"narrowed_{node.name}"
            )
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=scaled: user is not own)
