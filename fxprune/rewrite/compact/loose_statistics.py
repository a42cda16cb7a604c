"""Find statistics over channels that no norm holds: a network returns them, or adds them to something else.

The graph follows no path through a variance or a mean of squares, so that nothing in it says what they read.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from fxprune.graph import ChannelGraph, ir
from fxprune.lowering.norm_statistics import (
    POINTWISE,
    REDUCTIONS,
    counted_node,
    kind_of,
    name_of,
    reduced_axes,
    reductions,
)
from fxprune.rewrite.compact.constants import Recorded
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.statistics import give_back_counted
from fxprune.torch_private import pytree

__all__ = ["keep_loose_statistics", "loose_statistics"]

RESHAPES = {"getitem", "view", "reshape", "unsqueeze", "squeeze", "flatten", "expand", "expand_as"}


def loose_statistics(
    graph: ChannelGraph, nodes: Mapping[str, fx.Node], cut: Cut
) -> dict[fx.Node, tuple[ir.Value, int | None]]:
    """Return the nodes that lead from channels of which some go to a statistic that no norm holds.

    Each with the value that it reads and the axis that it adds up; ``None`` where what it gives has the
    channels and is returned or added up later, or where it adds up several axes.
    """
    held: set[fx.Node] | None = None
    found: dict[fx.Node, tuple[ir.Value, int | None]] = {}
    for node in nodes.values():
        value = _left(graph, node)
        if value is None or not cut.touches(value):
            continue
        if held is None:
            held = _held(graph, nodes)
        if node in held:
            continue
        shrinking = [axis for axis in range(len(value.shape)) if cut.kept_along(value, axis) is not None]
        added = reduced_axes(node) if name_of(node) in REDUCTIONS else ()
        axes = [axis for axis in shrinking if axis in added]
        if len(axes) == len(shrinking) == 1:
            found[node] = value, axes[0]
        elif axes or _is_asked_for(graph, node, held):
            found[node] = value, None
    return found


def keep_loose_statistics(
    graph: ChannelGraph, nodes: Mapping[str, fx.Node], cut: Cut, recorded: Recorded
) -> None:
    """Give back the channels that such a statistic counts though they go, or all if that cannot be told."""
    for node, (value, axis) in loose_statistics(graph, nodes, cut).items():
        place = f"{node.name}: a statistic over channels"
        if axis is not None:
            counted = counted_node(node, axis)
            read = None if counted is None else graph.results.get(counted.name)
            if isinstance(read, ir.Value) and give_back_counted(cut, read, axis, [counted], recorded, place):
                continue
        cut.give_back(cut.labels_of(value), place)


def _left(graph: ChannelGraph, node: fx.Node) -> ir.Value | None:
    """The value on a path that a node reads and leaves, as what it gives is on none."""
    result = graph.results.get(node.name)
    if node.op not in ("call_function", "call_method") or _is_live(result):
        return None
    if name_of(node).endswith("_like") or name_of(node).startswith("new_"):
        return None  # it reads the shape alone
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val"))):
        return None
    # Of the second tensor of ``expand_as`` the shape alone is read.
    sources = node.all_input_nodes[: 1 if name_of(node).endswith("_as") else None]
    read = [graph.results.get(source.name) for source in sources]
    return next((value for value in read if isinstance(value, ir.Value) and value.live), None)


def _is_live(result: object) -> bool:
    return any(isinstance(leaf, ir.Value) and leaf.live for leaf in pytree.tree_leaves(result))


def _held(graph: ChannelGraph, nodes: Mapping[str, fx.Node]) -> set[fx.Node]:
    """The statistics that norms hold."""
    found: set[fx.Node] = set()
    order = {node: place for place, node in enumerate(nodes.values())}
    for op in graph.ops:
        if isinstance(op, ir.Norm) and op.node in nodes and kind_of(nodes[op.node]) == "":
            for axis in op.axes:
                found.update(reductions(graph, op, axis, nodes, order) or ())
    return found


def _is_asked_for(graph: ChannelGraph, node: fx.Node, held: set[fx.Node]) -> bool:
    """Whether what a node gives is returned, added up or moved before a path is met."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user in seen or _is_live(graph.results.get(user.name)):
                continue
            if user not in held and not _keeps_places(user):
                return True
            seen.add(user)
            waiting.append(user)
    return False


def _keeps_places(node: fx.Node) -> bool:
    """Whether every entry stays that of its channel, as far as is known; a layer may take the channels."""
    if node.op == "call_module" or name_of(node) in POINTWISE | {"rsqrt"}:
        return True
    if name_of(node) not in RESHAPES or len(node.all_input_nodes) != 1:
        return False
    vals = [each.meta.get("val") for each in (node.all_input_nodes[0], node)]
    if not isinstance(vals[0], Tensor):
        return isinstance(vals[1], Tensor)  # one of a pair
    shapes = [[size for size in val.shape if size != 1] for val in vals if isinstance(val, Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]
