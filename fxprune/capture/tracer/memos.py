"""Compute again what an earlier run of a model left in its attributes.

A module may keep what it computes from its parameters (a table of position biases, for evaluation), and take
it from there the next time. In a graph it is computed each time: the same, or newer than what was kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.tracer.spelling import is_pure
from fxprune.torch_private import DisableTorchFunction

__all__ = ["Cache", "Memos", "ancestors", "find_caches", "first_writes"]


NEW = ("empty", "full", "ones", "zeros")
"""Functions that make a tensor which has no other name."""


@dataclass(frozen=True)
class Cache:
    """An entry of a dictionary that a module holds, and the tensor that was kept there."""

    entries: dict[Any, Any]
    key: Any
    kept: Tensor


def find_caches(model: nn.Module) -> list[Cache]:
    """Find tensors in dictionaries of the modules' own, which may have been kept by runs before."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    tables = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and not name.startswith("_")
    ]
    return [
        Cache(table, key, item)
        for table in tables
        for key, item in table.items()
        if isinstance(item, Tensor) and id(item) not in own
    ]


class Memos:
    """``nodes``: by ``id`` of a tensor of an earlier run, the node there, which depends on no input.

    ``alive`` keeps these tensors, so that no other gets their ``id``; ``constants`` are those of that run's
    tape, by name. ``others``: nodes that may depend on inputs, which count in :meth:`with_sizes`.
    """

    def __init__(
        self,
        nodes: Mapping[int, fx.Node] | None = None,
        alive: Sequence[Any] = (),
        constants: Mapping[Any, Any] | None = None,
        others: Mapping[int, fx.Node] | None = None,
    ) -> None:
        self._nodes, self._constants = dict(nodes or {}), dict(constants or {})
        self._alive, self._others = list(alive), dict(others or {})
        self._copies: dict[fx.Node, fx.Node] = {}

    def with_sizes(self) -> Memos:
        """Take for known, too, what depends on nothing of an input but its sizes."""
        return Memos({**self._others, **self._nodes}, self._alive, self._constants)

    def recomputed(
        self,
        tensor: Tensor,
        graph: fx.Graph,
        read: Callable[[Tensor], fx.Node],
        place: Callable[[fx.Node], None],
    ) -> fx.Node | None:
        """A node of ``graph`` that computes ``tensor`` as the earlier run did; None if that is not known.

        ``read`` makes the node of a constant; ``place`` is told of each node that computes.
        """
        last = self._nodes.get(id(tensor))
        if last is None:
            return None
        chain = _with_writes(last)
        inputs = [node for node in chain if node.op == "placeholder"]
        here = {str(node.target): node for node in graph.nodes if node.op == "placeholder"} if inputs else {}
        given = {node: here[str(node.target)] for node in inputs}
        known = {*given, *(write for node in chain for write in first_writes(node))}
        if not all(node in known or is_pure(node) for node in chain) or not _same_sizes(chain, given):
            return None
        self._copies.update(given)
        for node in chain:
            if node in self._copies:
                continue
            if node.op == "get_attr" and node.target in self._constants:
                self._copies[node] = read(self._constants[node.target])
                continue
            self._copies[node] = graph.node_copy(node, self._copies.__getitem__)
            if node.op != "get_attr":
                place(self._copies[node])
        return self._copies[last]

    def explain(self, caches: Sequence[Cache], model: nn.Module) -> bool:
        """Whether the run has filled all ``caches`` again, with the numbers that they had."""
        return all(self._explains(cache, model) for cache in caches)

    @torch.no_grad()
    def _explains(self, cache: Cache, model: nn.Module) -> bool:
        last = self._nodes.get(id(cache.entries.get(cache.key)))
        chain = [] if last is None else ancestors(last)
        if last is None or cache.kept.is_meta or not all(is_pure(node) for node in chain):
            return False
        values: dict[fx.Node, Any] = {}
        with DisableTorchFunction():
            for node in chain:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "get_attr":
                    name = str(node.target)
                    known = self._constants.get(name)
                    values[node] = attrgetter(name)(model) if known is None else known
                elif node.op == "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        new, old = values[last], cache.kept.detach()
        alike = isinstance(new, Tensor) and (new.dtype, new.device) == (old.dtype, old.device)
        return alike and torch.equal(new, old)


def _same_sizes(chain: Sequence[fx.Node], given: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a chain reads nothing of its inputs but sizes, which are the same in those of another run."""
    shapes: dict[Any, torch.Size] = {}
    for node in chain:
        sources = node.all_input_nodes
        if node.target is getattr and node.args[0] in given and node.args[1] == "device":
            continue
        if node.target is getattr and node.args[0] in given and node.args[1] == "shape":
            shapes[node] = given[sources[0]].meta["val"].shape
        elif node.target is operator.getitem and node.args[0] in shapes:
            if shapes[node.args[0]][node.args[1]] != node.meta["val"]:  # type: ignore[index]
                return False
        elif any(source in given or source in shapes for source in sources):
            return False
    return True


def first_writes(node: fx.Node) -> list[fx.Node]:
    """List what sets entries of a new tensor, if all of that comes before anything else reads it."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in NEW:
        return []
    users = list(node.users)  # in the order of the trace
    writes = [user for user in users if user.target is operator.setitem and user.args[0] is node]
    return writes if users[: len(writes)] == writes else []


def _with_writes(last: fx.Node) -> list[fx.Node]:
    """The ancestors of a node, with what sets entries in them, and the ancestors of that."""
    found: set[fx.Node] = set()
    pending = [last]
    while pending:
        fresh = [node for node in ancestors(pending.pop()) if node not in found]
        found.update(fresh)
        pending += [write for node in fresh for write in first_writes(node)]
    return [node for node in last.graph.nodes if node in found]


def ancestors(last: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, in the order of the graph."""
    found, pending = {last}, [last]
    while pending:
        fresh = [node for node in pending.pop().all_input_nodes if node not in found]
        found.update(fresh)
        pending += fresh
    return [node for node in last.graph.nodes if node in found]
