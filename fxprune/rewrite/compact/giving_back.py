"""Give back the channels near a place of the graph that cannot do without them."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from torch import fx

from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.cut import Cut
from fxprune.rewrite.compact.trial import NodeFailure

MOVING = (ir.Gate, ir.Gather, ir.Mix, ir.Pool, ir.Sum)

__all__ = ["give_back_before", "give_back_node", "give_back_users"]


def give_back_users(graph: ChannelGraph, cut: Cut, name: str, reason: str) -> bool:
    """Give back all channels that the operations with the parameter ``name`` read and make; False if none."""
    found = False
    for op in graph.ops:
        if any(use.name == name for use in op.params):
            for value in (*op.inputs, op.output):
                found |= cut.give_back(cut.labels_of(value), reason)
    return found


def give_back_node(graph: ChannelGraph, cut: Cut, nodes: dict[str, fx.Node], error: NodeFailure) -> bool:
    """Give back what a node that failed reads and makes, or else what the nodes before or behind it do.

    A node between parameters alone makes no channels: what reads these parameters gives its own back. Of what
    is inside of a node, channels that only layers and functions of single entries see go on trial once more.
    """
    name = error.node.removeprefix("narrowed_")
    if name not in nodes:
        return False
    reason = f"{error.node}: {str(error.__cause__)[:80]}"
    if _give_back_moved(graph, cut, name, reason):
        return True
    return give_back_before(graph, cut, nodes[name], reason) or (
        _give_back_near(graph, cut, nodes[name], reason, lambda node: list(node.users))
        or any(give_back_users(graph, cut, read, reason) for read in _parameters_before(nodes[name]))
    )


def _give_back_moved(graph: ChannelGraph, cut: Cut, name: str, reason: str) -> bool:
    """Give back what code inside of a node moves, adds up or multiplies; False if there is none."""
    found = False
    for op in graph.ops:
        if op.node == name and op.inner and isinstance(op, MOVING):
            for value in (*op.inputs, op.output):
                found |= cut.give_back(cut.labels_of(value), reason)
    return found


def _parameters_before(node: fx.Node) -> list[str]:
    """The names of the parameters that a node is computed from."""
    seen = dict.fromkeys([node])
    waiting = [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in seen]
        seen |= dict.fromkeys(new)
        waiting += new
    return [str(found.target) for found in seen if found.op == "get_attr"]


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
