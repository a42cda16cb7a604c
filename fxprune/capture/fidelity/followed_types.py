"""Types among the arguments of nodes: which of them follow the precision of the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxprune.capture.fidelity.compare import Differences
from fxprune.capture.tracer.entries import DtypeOf
from fxprune.capture.tracer.trace import Trace

__all__ = ["resolve_types"]


def resolve_types(base: Trace, found: Differences) -> None:
    """Types among the arguments become nodes where they follow the inputs' precision, constants elsewhere.

    ``found`` compares ``base`` with a trace in another precision: what is a constant there is one here.
    """
    followers: dict[fx.Node, list[bool]] = {}
    for other, node in found.pairs.items():
        mine, theirs = _types(node), _types(other)
        if len(mine) == len(theirs):
            followers[node] = [
                isinstance(a, DtypeOf) and isinstance(b, DtypeOf) and a.dtype != b.dtype
                for a, b in zip(mine, theirs, strict=True)
            ]
    for node in list(base.graph.nodes):
        if not any(isinstance(item, DtypeOf) for item in _types(node)):
            continue
        follows = iter(followers.get(node, ()))

        def resolved(item: Any, node: fx.Node = node, follows: Any = follows) -> Any:
            follow = next(follows, False) if isinstance(item, DtypeOf | torch.dtype) else False
            if not isinstance(item, DtypeOf):
                return item
            if not follow:
                return item.dtype
            with base.graph.inserting_before(node):
                made = base.graph.call_function(getattr, (item.source, "dtype"))
            made.meta["val"] = item.dtype
            return made

        node.args, node.kwargs = map_aggregate(node.args, resolved), map_aggregate(node.kwargs, resolved)


def _types(node: fx.Node) -> list[Any]:
    found: list[Any] = []

    def look(item: Any) -> Any:
        if isinstance(item, DtypeOf | torch.dtype):
            found.append(item)
        return item

    map_aggregate((node.args, node.kwargs), look)
    return found
