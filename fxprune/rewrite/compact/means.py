"""Let means and extremes over channels give what they gave before some went, which were zero."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.graph import ChannelGraph, ir
from fxprune.lowering.norm_statistics import kind_of, reductions
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.loose_statistics import loose_statistics
from fxprune.rewrite.compact.narrow_statistics import narrow_statistic

__all__ = ["scale_means"]


def scale_means(graph: ChannelGraph, gm: fx.GraphModule, cut: Cut) -> None:
    """Multiply means over fewer entries by the share that is left, and let extremes see a zero, in place."""
    nodes = {node.name: node for node in gm.graph.nodes}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    found: dict[fx.Node, tuple[float, int, int]] = {}  # all are looked for before the first is rewritten
    for op in graph.ops:
        if isinstance(op, ir.Norm) and op.node in nodes and kind_of(nodes[op.node]) == "":
            found |= _statistics(graph, op, nodes, order, cut)
    for node, (value, axis) in loose_statistics(graph, nodes, cut).items():
        if axis is not None:
            found[node] = _share(cut, value, (axis,)), axis, value.shape[axis]
    means = {nodes[op.node] for op in graph.ops if isinstance(op, ir.Pool) and op.output.live}
    for node, (share, axis, size) in found.items():
        if node not in means:
            narrow_statistic(node, share, axis, size)
    for op in graph.ops:
        if not isinstance(op, ir.Pool) or op.window is not None or not op.output.live:
            continue
        if op.how != "mean" and not op.extreme:
            continue
        share = _share(cut, op.inputs[0], op.dims)
        if share == 1.0:
            continue
        node = nodes[op.node]
        if op.extreme and not op.inner:
            if not _bound(node, op.extreme):
                raise UnevenCut(f"{op.layer or op.node}: all of truth values", cut.labels_of(op.inputs[0]))
            continue
        if op.inner or getattr(node.target, "__name__", node.target) != "mean":
            raise UnevenCut(f"{op.layer or op.node}: a mean over channels", cut.labels_of(op.inputs[0]))
        _scale(node, share)


def _bound(node: fx.Node, extreme: str) -> bool:
    """Compare the largest or the smallest of the entries that are left with the zeros that are not.

    Of truth values, the largest needs nothing, and the smallest cannot be told: then the answer is False.
    """
    whole = isinstance(node.meta["val"], torch.Tensor)
    for found in [node] if whole else list(node.users):
        kind = found.meta["val"].dtype
        if kind != torch.bool:
            # A float would turn whole numbers to floats.
            zero = 0.0 if kind.is_floating_point else 0
            _insert(found, torch.clamp, {"min" if extreme == "largest" else "max": zero})
        elif extreme == "smallest":
            return False
    return True


def _statistics(
    graph: ChannelGraph, op: ir.Norm, nodes: dict[str, fx.Node], order: dict[fx.Node, int], cut: Cut
) -> dict[fx.Node, tuple[float, int, int]]:
    """The statistics in a norm that is written by hand: what share is left of which axis, and its size."""
    value, found = op.inputs[0], {}
    for axis in op.axes:
        share = _share(cut, value, (axis,))
        if share != 1.0:
            for node in reductions(graph, op, axis, nodes, order) or ():
                found[node] = share, axis, value.shape[axis]
    return found


def _share(cut: Cut, value: ir.Value, dims: Sequence[int]) -> float:
    """The share of the entries along ``dims`` that is left."""
    if not cut.touches(value):
        return 1.0
    left = math.prod(cut.shape(value)[axis] for axis in dims)
    return left / math.prod(value.shape[axis] for axis in dims)


def _scale(node: fx.Node, share: float) -> None:
    _insert(node, operator.mul, {}, share)


def _insert(node: fx.Node, function: Callable[..., Any], kwargs: dict[str, Any], *args: float) -> None:
    """Let a function of a node take its place."""
    with node.graph.inserting_after(node):
        new = node.graph.create_node(
            "call_function", function, (node, *args), kwargs, name=f"narrowed_{node.name}"
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
