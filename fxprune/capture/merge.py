"""Two traces of a model that takes other branches in training than in evaluation, as one graph.

In: the trace in evaluation and the one in training, which differ in the model's own forward only
(auxiliary heads, distilled outputs). Out: the first one's graph, with what only training does added, and
a :class:`ModeSwitch` wherever the two go on with different values.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fxprune.capture.compare import aligned, equal_tensors
from fxprune.capture.errors import CaptureError
from fxprune.capture.modes import Switches
from fxprune.capture.ops import changes_input, is_pure
from fxprune.capture.recorder import DtypeOf, Scope
from fxprune.capture.trace import Trace

__all__ = ["merge"]


def merge(model: nn.Module, base: Trace, training: Trace, switches: Switches) -> None:
    """Add to ``base.graph`` what ``training`` does besides.

    Raises:
        CaptureError: one mode would have to run what the other one does, and that is not harmless (it
        draws random
            numbers, writes into a tensor, or updates statistics).
    """
    _Merge(model, base, training, switches).run()


class _Merge:
    def __init__(self, model: nn.Module, base: Trace, training: Trace, switches: Switches) -> None:
        self.model, self.base, self.training, self.switches = model, base, training, switches
        self.graph = base.graph
        self.twin: dict[fx.Node, fx.Node] = {}
        self.added: set[fx.Node] = set()
        self.last = next(iter(self.graph.nodes))
        self.attributes = {node.target: node for node in self.graph.nodes if node.op == "get_attr"}

    def run(self) -> None:
        self.scopes(self.base.scope, self.training.scope)
        self.graph.lint()

    def scopes(self, a: Scope, b: Scope) -> None:
        for mine, other in aligned(a, b):
            if mine and other and isinstance(mine[0], Scope):
                self.scopes(mine[0], other[0])
            elif mine and other:
                self.pair(mine[0], other[0])
            else:
                for node in _flat(mine):
                    self.only_evaluation(node)
                for node in _flat(other):
                    self.only_training(node)

    def pair(self, a: fx.Node, b: fx.Node) -> None:
        self.twin[b] = self.last = a
        with self.graph.inserting_before(a):
            a.args, a.kwargs = self.joined(a.args, b.args), self.joined(a.kwargs, b.kwargs)

    def joined(self, a: Any, b: Any) -> Any:
        """The arguments of a node that both modes have: a choice wherever they differ."""
        if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
            return type(a)([self.joined(x, y) for x, y in zip(a, b, strict=True)])
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.joined(a[key], b[key]) for key in a}
        other = self.translated(b)
        if isinstance(a, fx.Node) or isinstance(other, fx.Node):
            same = a is other
        else:
            same = type(a) is type(other) and a == other
        return a if same else self.switches.choose(self.graph, "", other, a)

    def translated(self, value: Any) -> Any:
        """Arguments of the training trace in terms of the merged graph."""
        plain = map_aggregate(value, lambda x: x.dtype if isinstance(x, DtypeOf) else x)
        return map_arg(plain, lambda node: self.attribute(node) if node.op == "get_attr" else self.twin[node])

    def attribute(self, node: fx.Node) -> Any:
        name = str(node.target)
        constant = self.training.constants.get(name)
        if constant is not None:
            known = [key for key, value in self.base.constants.items() if equal_tensors(value, constant)]
            name = known[0] if known else f"{name}_training"
            self.base.constants[name] = constant
        if name not in self.attributes:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                made = self.graph.get_attr(name)
            made.meta.update(node.meta)
            self.attributes[name] = made
        return self.attributes[name]

    def only_evaluation(self, node: fx.Node) -> None:
        self.last = node
        if node.op == "call_module":
            inner = self.model.get_submodule(str(node.target)).modules()
            harmless = not any(isinstance(module, _NormBase | _DropoutNd | nn.RNNBase) for module in inner)
        else:
            harmless = is_pure(node)
        if not harmless:
            raise CaptureError(_refusal(node, "evaluation"))

    def only_training(self, node: fx.Node) -> None:
        operand = node.args[0] if node.args else None
        fresh = isinstance(operand, fx.Node) and operand.op == "call_module" and operand in self.added
        if node.op != "call_module" and not is_pure(node) and not (changes_input(node) and fresh):
            raise CaptureError(_refusal(node, "training"))
        with self.graph.inserting_after(self.last):
            made = self.graph.create_node(
                node.op, node.target, self.translated(node.args), self.translated(node.kwargs), node.name
            )
        made.meta.update(node.meta)
        self.twin[node] = self.last = made
        self.added.add(node)


def _flat(entries: list[Any]) -> list[fx.Node]:
    return [
        node for entry in entries for node in (_flat(entry.entries) if isinstance(entry, Scope) else [entry])
    ]


def _refusal(node: fx.Node, mode: str) -> str:
    return (
        f"its own forward calls {node.target} in {mode} only, which the other mode cannot run without "
        "changing its result; move that branch into a submodule, which then stays whole"
    )
