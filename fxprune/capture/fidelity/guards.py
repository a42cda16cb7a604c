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

from fxprune.capture.tracer.entries import Decision
from fxprune.torch_private import check_number

__all__ = ["guard_constants", "guard_decisions", "guard_sizes", "guarded_sizes"]

CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
OPPOSITE: dict[Any, Callable[..., Any]] = {
    operator.eq: operator.ne,
    operator.ne: operator.eq,
    operator.lt: operator.ge,
    operator.ge: operator.lt,
    operator.gt: operator.le,
    operator.le: operator.gt,
}
SIGNS: dict[Any, str] = dict(zip(OPPOSITE, ("==", "!=", "<", ">=", ">", "<="), strict=True))


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
            writer.constant(node, str(node.target), value)
        elif isinstance(value, list | tuple | dict):
            writer.entries(node, str(node.target), value)


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
        check = node.args[0] if node.target is check_number else None
        size = check.args[0] if isinstance(check, fx.Node) and check.target is operator.eq else None
        if isinstance(size, fx.Node) and size.target is operator.getitem:
            shape, dim = size.args
            if isinstance(shape, fx.Node) and shape.target is getattr and isinstance(shape.args[0], fx.Node):
                found.add((str(shape.args[0].target), int(dim)))  # type: ignore[arg-type]
    return found


def guard_decisions(
    graph: fx.Graph,
    decisions: Iterable[Decision],
    pairs: dict[fx.Node, fx.Node],
    model: str,
    cause: str = "the size of its inputs",
) -> None:
    """Guard the decisions that the model made by the size of its inputs, or by what else ``cause`` names.

    ``pairs`` maps nodes of a trace with other sizes to those of ``graph``: numbers that differ follow
    it.
    """
    partners = {first: second for second, first in pairs.items()}
    order = {node: index for index, node in enumerate(graph.nodes)}
    done: set[Any] = set()
    for decision in decisions:
        operands = [item for item in (decision.node, decision.other) if isinstance(item, fx.Node)]
        follows = any(
            node in partners and partners[node].meta["val"] != node.meta["val"] for node in operands
        )
        key = (decision.function, decision.node, decision.other)
        if not follows or key in done or any(node not in order for node in operands) or _certain(decision):
            continue
        done.add(key)
        function = decision.function if decision.result else OPPOSITE[decision.function]
        last = max(operands, key=order.__getitem__)
        values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in key[1:]]
        writer = _Writer(graph, model, last)
        check = writer.make(function, key[1:], True)
        place = f"module {decision.path!r}" if decision.path else "its forward"
        told = (
            f"{model}: {place} decides by {cause} (captured where {values[0]} "
            f"{SIGNS[function]} {values[1]}); capture it again for this one"
        )
        writer.make(check_number, (check, told), None)


def _certain(decision: Decision) -> bool:
    """Whether a comparison comes out the same for every size: none is below one."""
    size = decision.node.target is operator.getitem
    return size and not isinstance(decision.other, fx.Node) and decision.other < 1


class _Writer:
    """Puts nodes behind the placeholders, or behind ``last``."""

    def __init__(self, graph: fx.Graph, model: str, last: fx.Node | None = None) -> None:
        self.graph, self.model = graph, model
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.last = last or (self.placeholders[-1] if self.placeholders else None)

    def make(self, function: Callable[..., Any], args: tuple[Any, ...], val: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(function, args)
        self.last.meta["val"] = val
        return self.last

    def constant(self, node: fx.Node, name: str, value: Any) -> None:
        alike = operator.is_ if value is None or isinstance(value, bool) else operator.eq
        self.expect(alike, node, value, f"{name}: {{}} was captured with {value!r}")

    def entries(self, node: fx.Node, name: str, value: Any) -> None:
        """A list, tuple or dict: its length, and what is no tensor in it."""
        count = self.make(len, (node,), len(value))
        self.expect(operator.eq, count, len(value), f"{name}: {{}} was captured with {len(value)} entries")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, CONSTANTS):
                self.constant(self.make(operator.getitem, (node, key), item), f"{name}[{key!r}]", item)
            elif isinstance(item, list | tuple | dict):
                self.entries(self.make(operator.getitem, (node, key), item), f"{name}[{key!r}]", item)

    def expect(self, alike: Callable[..., Any], node: fx.Node, value: Any, message: str) -> None:
        check = self.make(alike, (node, value), True)
        told = (
            f"{message.format(self.model)}, and computes that only; capture it again for another, or prune"
            " with returns='module', which takes any"
        )
        self.make(check_number, (check, told), None)
