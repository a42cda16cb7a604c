"""Checks that the graph makes of its inputs, where capture had to take something for constant.

In: a graph and what it took for constant: an argument that is no tensor, a size, the length of a list. Out:
nodes that raise when the graph is run on something else, for which it would be silently wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["guard_constants", "guard_sizes", "guarded_sizes"]

CONSTANTS = (type(None), bool, int, float, str, torch.dtype)


def guard_constants(graph: fx.Graph, model: str) -> None:
    """Arguments that are no tensors have one value; lists, tuples and dicts of tensors have one length.

    Example:
        >>> graph = fx.Graph()
        >>> graph.placeholder("scale", default_value=2.0).meta["val"] = 2.0
        >>> guard_constants(graph, "Net")
        >>> [node.name for node in graph.nodes]
        ['scale', 'eq', '_assert']
    """
    writer = _Writer(graph, model)
    for node in writer.placeholders:
        value = node.meta["val"]
        if isinstance(value, CONSTANTS):
            alike = operator.is_ if value is None or isinstance(value, bool) else operator.eq
            writer.expect(alike, node, value, f"{node.target}: {{}} was captured with {value!r}")
        elif isinstance(value, list | tuple | dict):
            count = writer.make(len, (node,), len(value))
            message = f"{node.target}: {{}} was captured with {len(value)} entries"
            writer.expect(operator.eq, count, len(value), message)


def guard_sizes(graph: fx.Graph, dims: Callable[[str, Tensor], Iterable[int]], model: str) -> None:
    """The given dimensions of tensors among the arguments, by name and shape, have one size."""
    writer = _Writer(graph, model)
    for node in writer.placeholders:
        value = node.meta["val"]
        for dim in dims(str(node.target), value) if isinstance(value, Tensor) else ():
            shape = writer.make(getattr, (node, "shape"), value.shape)
            size = writer.make(operator.getitem, (shape, dim), value.shape[dim])
            message = f"{node.target}: {{}} was captured with size {value.shape[dim]} in dimension {dim}"
            writer.expect(operator.eq, size, value.shape[dim], message)


def guarded_sizes(graph: fx.Graph) -> set[tuple[str, int]]:
    """The arguments and dimensions that a graph checks the size of."""
    found: set[tuple[str, int]] = set()
    for node in graph.nodes:
        check = node.args[0] if node.target is torch._assert else None
        size = check.args[0] if isinstance(check, fx.Node) and check.target is operator.eq else None
        if isinstance(size, fx.Node) and size.target is operator.getitem:
            shape, dim = size.args
            if isinstance(shape, fx.Node) and shape.target is getattr and isinstance(shape.args[0], fx.Node):
                found.add((str(shape.args[0].target), int(dim)))  # type: ignore[arg-type]
    return found


class _Writer:
    """Puts nodes behind the placeholders."""

    def __init__(self, graph: fx.Graph, model: str) -> None:
        self.graph, self.model = graph, model
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.last = self.placeholders[-1] if self.placeholders else None

    def make(self, function: Callable[..., Any], args: tuple[Any, ...], val: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(function, args)
        self.last.meta["val"] = val
        return self.last

    def expect(self, alike: Callable[..., Any], node: fx.Node, value: Any, message: str) -> None:
        check = self.make(alike, (node, value), True)
        told = f"{message.format(self.model)}, and computes that only; capture it again for another"
        self.make(torch._assert, (check, told), None)
