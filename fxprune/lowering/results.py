"""Keep what every node of the captured graph yields, so that a pass can go from nodes to values and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxprune.capture import ModeSwitch
from fxprune.capture.module import OpenGraph
from fxprune.graph import ir
from fxprune.lowering.builder import Builder
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import tensors_in

__all__ = ["Results", "bind", "gives_tensors", "leaves", "training_outputs"]


class Results:
    """The results of the nodes lowered so far, in execution order."""

    def __init__(self, build: Builder) -> None:
        self.build = build
        self.found: dict[str, Any] = {}
        self.nodes: dict[int, fx.Node] = {}  # the first that yields a constant, by id of the constant

    def record(self, node: fx.Node, result: Any) -> None:
        """Keep what ``node`` yields; later writes to its memory do not change it."""
        operands = list(tensors_in(result))
        if not operands:
            return
        self.found[node.name] = result
        for x in operands:
            if isinstance(x, Constant):
                self.nodes.setdefault(id(x), node)
                self.build.constant_nodes.setdefault(id(x), node.name)

    def values(self) -> tuple[dict[str, Any], dict[int, ir.ConstantValue]]:
        """Return what every node yields, as values, and the constants among them that no op makes."""
        constants: dict[int, ir.ConstantValue] = {}

        def value(x: ir.Value | Constant) -> ir.Value:
            if isinstance(x, ir.Value):
                return x
            if id(x) not in self.build.sources:
                own = self.build.sources[id(x)] = self.build.value(x.shape, False)
                constants[own.index] = ir.ConstantValue(own, self.nodes[id(x)].name, x.dtype)
            return self.build.sources[id(x)]

        def plain(x: Any) -> Any:
            if isinstance(x, (ir.Value, Constant)):
                return value(x)
            if isinstance(x, dict):
                return {key: plain(item) for key, item in x.items()}
            if isinstance(x, list):
                return [plain(item) for item in x]
            if isinstance(x, tuple):
                return tuple(plain(item) for item in x)
            if is_dataclass(x) and not isinstance(x, type):
                return {key: plain(item) for key, item in vars(x).items()}
            return None

        return {name: plain(result) for name, result in self.found.items()}, constants


def training_outputs(
    gm: fx.GraphModule, values: dict[str, Any], ops: Sequence[ir.AnyOp]
) -> tuple[ir.Value, ...]:
    """Return the values on paths that a network gives in training only, such as those of auxiliary heads.

    ``values``: what every node yields, by its name. Only switches that the network returns are followed: all
    others choose between two ways to compute what the next layer reads.
    """
    waiting, seen = list(gm.graph.output_node().all_input_nodes), set[fx.Node]()
    found: dict[int, ir.Value] = {}

    def keep(node: fx.Node) -> None:
        found.update((x.index, x) for x in tensors_in(values.get(node.name)) if isinstance(x, ir.Value))

    while waiting:
        node = waiting.pop()
        if node.op == "call_module" and node not in seen:
            seen.add(node)
            if isinstance(gm.get_submodule(str(node.target)), ModeSwitch):
                fx.node.map_arg(node.args[0], keep)
                waiting += node.all_input_nodes
    returned = {value.index for op in ops if isinstance(op, ir.Sink) for value in op.inputs}
    return tuple(value for index, value in sorted(found.items()) if value.live and index not in returned)


def bind(inner: OpenGraph, args: Any, kwargs: Any) -> list[Any]:
    """Arguments in the order of the inner graph's placeholders; defaults (their captured values) where not
    given.
    """
    placeholders = [node for node in inner.graph.nodes if node.op == "placeholder"]
    inputs = list(args)
    for node in placeholders[len(inputs) :]:
        name = str(node.target).lstrip("*")
        inputs.append(kwargs.get(name, node.meta["val"]))
    return inputs


def leaves(x: Any) -> list[Any]:
    """List what stands in nested lists, tuples and dicts."""
    if isinstance(x, (list, tuple)):
        return [leaf for item in x for leaf in leaves(item)]
    if isinstance(x, dict):
        return [leaf for item in x.values() for leaf in leaves(item)]
    return [x]


def gives_tensors(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node gives a tensor in evaluation, or chooses one in training alone."""
    given = node.all_input_nodes if isinstance(module, ModeSwitch) else []
    for val in (node.meta["val"], *(source.meta["val"] for source in given)):
        has_fields = hasattr(val, "__dataclass_fields__") and not isinstance(val, type)
        if any(isinstance(leaf, Tensor) for leaf in leaves(list(vars(val).values()) if has_fields else val)):
            return True
    return False
