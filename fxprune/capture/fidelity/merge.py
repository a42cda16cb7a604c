"""Two traces of a model that takes other branches in training than in evaluation, as one graph.

In: the trace in evaluation and the one in training, which differ in the model's own forward only (auxiliary
heads, distilled outputs, tokens dropped). Out: the first one's graph, with what only training does, and a
:class:`ModeSwitch` wherever the two go on with different values. What the other mode could not run without
harm goes into a :class:`ModeBranch`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from fxprune.capture.errors import CaptureError
from fxprune.capture.fidelity.compare import align_calls, equal_tensors
from fxprune.capture.fidelity.stand_ins import memories, not_in_place, stand_in, with_argument, without_draws
from fxprune.capture.modes import ModeBranch, Switches
from fxprune.capture.module import assemble
from fxprune.capture.tracer.contents import is_record
from fxprune.capture.tracer.entries import DtypeOf, Scope
from fxprune.capture.tracer.spelling import changes_input, is_pure
from fxprune.capture.tracer.trace import Trace
from fxprune.torch_private import DropoutNd, NormBase

__all__ = ["merge"]


def merge(model: nn.Module, base: Trace, training: Trace, switches: Switches) -> None:
    """Add to ``base.graph`` what ``training`` does besides.

    Raises:
        CaptureError: one mode calls a module that the other one does not and could not without harm (it
            draws random numbers or updates statistics).
    """
    _Merge(model, base, training, switches).scopes(base.scope, training.scope)
    base.graph.lint()


class _Merge:
    def __init__(self, model: nn.Module, base: Trace, training: Trace, switches: Switches) -> None:
        self.model, self.base, self.training, self.switches = model, base, training, switches
        self.graph = base.graph
        self.twin: dict[fx.Node, fx.Node] = {}
        self.back: dict[fx.Node, fx.Node] = {}
        self.added: set[fx.Node] = set()
        self.absent: set[fx.Node] = set()
        self.nothing: set[fx.Node] = set()  # in training
        self.last = next(iter(self.graph.nodes))
        self.attributes = {node.target: node for node in self.graph.nodes if node.op == "get_attr"}
        alone = [node for node in _in_the_first_alone(base.scope, training.scope) if changes_input(node)]
        self.written = {memory for node in alone for memory in memories(node.args[:1])}

    def scopes(self, a: Scope, b: Scope) -> None:
        for mine, other in align_calls(a, b):
            if mine and other and isinstance(mine[0], Scope):
                self.scopes(mine[0], other[0])
            elif mine and other:
                self.pair(mine[0], other[0])
            elif mine:
                self.only_evaluation(_flat(mine))
            else:
                self.only_training(_flat(other))

    # -- what both do ---------------------------------------------------------------------------------------
    def pair(self, a: fx.Node, b: fx.Node) -> None:
        self.twin[b] = self.last = a
        self.back[a] = b
        with self.graph.inserting_before(a):
            a.args, a.kwargs = self.joined(a.args, b.args), self.joined(a.kwargs, b.kwargs)

    def joined(self, a: Any, b: Any) -> Any:
        """The arguments of a node that both modes have: a choice wherever they differ."""
        if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
            return type(a)([self.joined(x, y) for x, y in zip(a, b, strict=True)])
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.joined(a[key], b[key]) for key in a}
        if isinstance(b, DtypeOf) and _is_type(a):
            return self.followed(a, b)
        other = self.translated(b)
        if isinstance(a, fx.Node) or isinstance(other, fx.Node):
            same = a is other
        else:
            same = type(a) is type(other) and a == other
        return a if same else self.switches.choose(self.graph, "", other, a)

    def followed(self, a: fx.Node, b: DtypeOf) -> Any:
        """The type that evaluation reads off a tensor, off one that both modes have."""
        for source in (a.args[0], self.twin.get(b.source)):
            if isinstance(source, fx.Node) and (source in self.back or source.op == "get_attr"):
                made = a if source is a.args[0] else self.graph.call_function(getattr, (source, "dtype"))
                made.meta["val"] = a.meta["val"]
                return made
        return b.dtype if a.args[0] in self.nothing else self.switches.choose(self.graph, "", b.dtype, a)

    def translated(self, value: Any) -> Any:
        """Arguments of the training trace in terms of the merged graph."""
        return map_arg(
            _constant_types(value),
            lambda node: self.attribute(node) if node.op == "get_attr" else self.twin[node],
        )

    def attribute(self, node: fx.Node) -> Any:
        name = str(node.target)
        constant = self.training.constants.get(name)
        if constant is not None:
            known = [key for key, value in self.base.constants.items() if equal_tensors(value, constant)]
            name = known[0] if known else f"{name}_training"
            self.base.constants[name] = constant
        first = next(iter(self.graph.nodes))
        if name not in self.attributes:
            with self.graph.inserting_before(first):
                made = self.graph.get_attr(name)
            made.meta.update(node.meta)
            self.attributes[name] = made
        elif self.attributes[name] is not first:
            # Training may need it earlier than evaluation does.
            first.prepend(self.attributes[name])
        return self.attributes[name]

    # -- what one of them does ------------------------------------------------------------------------------
    def only_evaluation(self, nodes: list[fx.Node]) -> None:
        nodes = _with_types(nodes)
        harmless = all(
            _still(self.model.get_submodule(str(node.target))) if node.op == "call_module" else is_pure(node)
            for node in nodes
        )
        operands = [operand for node in nodes for operand in node.all_input_nodes]
        fits = self.nothing.isdisjoint(operands) and all(
            _same_shape(operand, self.back[operand]) for operand in operands if operand in self.back
        )
        self.last = nodes[-1]
        if harmless and fits:
            return
        outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
        made = self.branch(nodes, outputs, lambda node: node, training=False)
        for node, part in zip(outputs, made, strict=True):
            node.replace_all_uses_with(part, lambda user: user not in nodes)
            part.meta.update(node.meta)
        self.nothing.update(made)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def only_training(self, nodes: list[fx.Node]) -> None:
        if all(self.runs_in_evaluation(node, nodes) for node in nodes):
            for node in nodes:
                args, kwargs = self.still(node)
                with self.graph.inserting_after(self.last):
                    made = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
                made.meta.update(node.meta)
                self.twin[node] = self.last = made
                self.added.add(node)
            return
        if any(node.op == "call_module" for node in nodes) and len(nodes) > 1:
            # What evaluation may run it runs, with something in place of the rest: the graph calls modules.
            for node in nodes:
                if form := not_in_place(node):
                    node.op, node.target, node.kwargs = form
                self.only_training([node])
            return
        outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
        parts = self.branch(nodes, outputs, lambda node: self.translated(node), training=True)
        self.twin.update(zip(outputs, parts, strict=True))
        self.absent.update(node for node, part in zip(outputs, parts, strict=True) if not _value(part))

    def still(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node of training with which it draws nothing in evaluation."""
        args, kwargs = self.translated(node.args), self.translated(node.kwargs)
        if found := without_draws(node):
            key, off = found
            on = kwargs[key] if isinstance(key, str) else args[key]
            if on != off:
                with self.graph.inserting_after(self.last):
                    self.last = self.switches.choose(self.graph, "", on, off)
                self.last.meta["val"] = off
                return with_argument(args, kwargs, key, self.last)
        return args, kwargs

    def runs_in_evaluation(self, node: fx.Node, block: list[fx.Node]) -> bool:
        """Whether evaluation may run a node of training without any effect: neither harm nor failure."""
        for operand in node.all_input_nodes:
            shared = operand not in block and operand not in self.added and operand.op != "get_attr"
            if operand in self.absent or (shared and not _same_shape(operand, self.twin[operand])):
                return False
            if shared and not self.written.isdisjoint(memories(self.twin[operand])):
                return False  # autograd refuses some views of what is written into
        switched = without_draws(node) is not None and not changes_input(node)
        if node.op == "call_module" or is_pure(node) or switched:
            return True
        # Writing into a tensor that a module of training's own has just made harms nobody.
        first = node.args[0] if node.args else None
        own = (
            isinstance(first, fx.Node)
            and first.op == "call_module"
            and (first in block or first in self.added)
        )
        return changes_input(node) and own

    def branch(
        self, nodes: list[fx.Node], outputs: list[fx.Node], outer: Any, *, training: bool
    ) -> list[fx.Node]:
        """A :class:`ModeBranch` that runs ``nodes`` in one mode only; the nodes for ``outputs``."""
        mode = "training" if training else "evaluation"
        for node in nodes:
            if node.op == "call_module":
                raise CaptureError(
                    f"its own forward calls {node.target} in {mode} only, and the other mode cannot run that "
                    "without changing its result"
                )
        inputs = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in nodes))
        instead = stand_in(nodes[0], inputs) if training and nodes == outputs and len(nodes) == 1 else None
        graphs = {
            True: _subgraph(nodes, inputs, outputs),
            False: instead or _subgraph([], inputs, [None] * len(outputs)),
        }
        parts = [assemble(nn.Module(), graphs[runs], {}) for runs in (training, not training)]
        name = self.switches.add(ModeBranch(*parts).train(self.model.training))
        with self.graph.inserting_after(self.last):
            call = self.graph.create_node("call_module", name, tuple(outer(node) for node in inputs))
        call.meta["val"] = tuple(None if training and not instead else node.meta["val"] for node in outputs)
        made = []
        self.last = call
        for index, val in enumerate(call.meta["val"]):
            with self.graph.inserting_after(self.last):
                self.last = self.graph.call_function(operator.getitem, (call, index))
            self.last.meta["val"] = val
            made.append(self.last)
        return made


def _subgraph(nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[Any]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in nodes:
        args, kwargs = _constant_types(node.args), _constant_types(node.kwargs)
        copies[node] = graph.create_node(
            node.op,
            node.target,
            map_arg(args, copies.__getitem__),
            map_arg(kwargs, copies.__getitem__),
            node.name,
        )
        copies[node].meta.update(node.meta)
    result = graph.output(tuple(None if node is None else copies[node] for node in outputs))
    result.meta["val"] = tuple(None if node is None else node.meta["val"] for node in outputs)
    return graph


def _value(node: fx.Node) -> bool:
    """Whether a node has a value in evaluation."""
    return node.meta["val"] is not None


def _is_type(value: Any) -> bool:
    """Whether a node reads the type of a tensor."""
    return isinstance(value, fx.Node) and value.target is getattr and value.args[1:] == ("dtype",)


def _with_types(nodes: list[fx.Node]) -> list[fx.Node]:
    """Nodes with those before them that read a type for them alone."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        types = [x for x in node.all_input_nodes if _is_type(x) and all(user in nodes for user in x.users)]
        found |= dict.fromkeys([*types, node])
    return list(found)


def _in_the_first_alone(a: Scope, b: Scope) -> Iterator[fx.Node]:
    """The nodes of a trace that the other one does not have."""
    for mine, other in align_calls(a, b):
        if mine and other and isinstance(mine[0], Scope):
            yield from _in_the_first_alone(mine[0], other[0])
        elif mine and not other:
            yield from _flat(mine)


def _constant_types(value: Any) -> Any:
    return map_aggregate(value, lambda x: x.dtype if isinstance(x, DtypeOf) else x)


def _still(module: nn.Module) -> bool:
    """Whether training mode runs a module as evaluation does."""
    for inner in module.modules():
        if isinstance(inner, NormBase | DropoutNd | nn.RNNBase):
            return False
    return True


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return bool(_shapes_of(a.meta.get("val")) == _shapes_of(b.meta.get("val")))


def _shapes_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, tuple | list):
        return [_shapes_of(item) for item in value]
    if isinstance(value, dict):
        return {key: _shapes_of(item) for key, item in value.items()}
    if is_record(value):  # what it holds may be None in one mode
        return type(value), {key: _shapes_of(item) for key, item in vars(value).items()}
    return type(value)


def _flat(entries: list[Any]) -> list[fx.Node]:
    return [
        node for entry in entries for node in (_flat(entry.entries) if isinstance(entry, Scope) else [entry])
    ]
