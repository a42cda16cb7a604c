"""Give back the channels near a place of the graph that cannot do without them."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.trial import NodeFailure

__all__ = ["give_back_before", "give_back_node", "give_back_users"]


def give_back_users(graph: ChannelGraph, cut: Cut, name: str, reason: str) -> None:
    """Give back all channels that the operations with the parameter ``name`` read and make."""
    for op in graph.ops:
        if any(use.name == name for use in op.params):
            for value in (*op.inputs, op.output):
                cut.give_back(cut.labels_of(value), reason)


def give_back_node(graph: ChannelGraph, cut: Cut, nodes: dict[str, fx.Node], error: NodeFailure) -> bool:
    """Give back what a node that failed reads and makes, or else what the nodes before or behind it do."""
    name = error.node.removeprefix("narrowed_")
    if name not in nodes:
        return False
    reason = f"{error.node}: {str(error.__cause__)[:80]}"
    return give_back_before(graph, cut, nodes[name], reason) or (
        _give_back_near(graph, cut, nodes[name], reason, lambda node: list(node.users))
    )


def give_back_before(graph: ChannelGraph, cut: Cut, node: fx.Node, reason: str) -> bool:
    """Give back the channels of the nearest nodes at or before ``node`` that have any; False if none has."""
    return _give_back_near(graph, cut, node, reason, attrgetter("all_input_nodes"))


def _give_back_near(
    graph: ChannelGraph, cut: Cut, start: fx.Node, reason: str, step: Callable[[fx.Node], list[fx.Node]]
) -> bool:
    """Give back the channels of the first nodes, ``step`` by ``step`` from ``start``, that have any."""
    near = [start]
    seen = set(near)
    while near:
        found = False
        for node in near:
            values = {
                value.index: value
                for op in graph.ops
                if op.node == node.name
                for value in (*op.inputs, op.output)
            }
            for source in (node, *node.all_input_nodes):
                value = graph.results.get(source.name)
                if isinstance(value, ir.Value):
                    values[value.index] = value
            for value in values.values():
                found |= cut.give_back(cut.labels_of(value), reason)
        if found:
            return True
        near = list(dict.fromkeys(new for node in near for new in step(node) if new not in seen))
        seen |= set(near)
    return False
