"""Lowering: from the captured network to the channel/kernel dataflow graph.

In: a captured :class:`torch.fx.GraphModule` (every node with ``meta["val"]``). Out: a :class:`ChannelGraph`.
One walk over the nodes asks the rule table; leaves without a rule are captured on their own and lowered in
place; what nobody knows becomes an opaque op, never a guess.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.capture import CaptureError, ModeBranch, Overwritten, capture_leaf
from fxprune.capture.collector import collector_paused
from fxprune.capture.function_body import FunctionBody
from fxprune.capture.leaves import dense_class
from fxprune.capture.module import OpenGraph, leaf_attributes
from fxprune.capture.narrowed_norms import NARROWED
from fxprune.capture.tracer.call_targets import AutogradCall
from fxprune.capture.tracer.calls_replaced import replaced_calls
from fxprune.capture.tracer.contents import is_record
from fxprune.capture.tracer.meta_values import map_structure
from fxprune.capture.tracer.spelling import DRAWS, called
from fxprune.graph import ir
from fxprune.graph.tensor_function import TensorFunction
from fxprune.keywords import refuse_unknown
from fxprune.lowering.aliases import Memory, written
from fxprune.lowering.builder import Builder
from fxprune.lowering.constant import Constant, unknown_numbers, without_numbers
from fxprune.lowering.folding import as_constants, changed, reads_after_write
from fxprune.lowering.follow import reads_of_result
from fxprune.lowering.joined import joined_weights
from fxprune.lowering.norm_statistics import hold_unknown_statistics
from fxprune.lowering.overwritten import attribute_at, overwritten_tensors
from fxprune.lowering.parameters import Parameters
from fxprune.lowering.reads import Reads, lost
from fxprune.lowering.results import Results, bind, gives_tensors, leaves, training_outputs
from fxprune.lowering.rules import KERNEL_TARGETS, RULES
from fxprune.lowering.rules.movement import MOVES, REARRANGES
from fxprune.lowering.rules.pointwise import statistic_axes
from fxprune.lowering.rules.table import (
    Context,
    Rules,
    Unknown,
    describe,
    described,
    find_rule,
    own_rules,
    positional,
    substitute,
    tensors_in,
)
from fxprune.lowering.weight_views import parameter_view, simplified, view_of

__all__ = ["lower"]

FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What code raises that meets arguments nobody has foreseen."""
ZERO = {torch.zeros, torch.zeros_like, "new_zeros", "zero_", torch.zero_}
EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, "new_empty", "new_empty_strided"}


def lower(
    gm: fx.GraphModule, *, rules: Rules | None = None, strict: bool = False, **others: NoReturn
) -> ir.ChannelGraph:
    """Lower a captured network to its channel/kernel dataflow graph.

    Args:
        gm: what :func:`fxprune.capture` returned, masked or not. It is not changed.
        rules: op rules of your own, a :class:`RuleTable` or a dict of target -> rule; where they name an
            operation that has a rule, they win (``docs/add_an_op.md``).
        strict: raise the error of an op rule that fails, for tests of rules. By default the op becomes
            opaque, with the rule and its error as the reason.

    Returns:
        The :class:`ChannelGraph`: ops in execution order, ``kernels`` by parameter name, ``opaque`` for ops
        that no rule knew.

    Raises:
        TypeError: ``gm`` is not a GraphModule, or ``rules`` are no rules.
        ValueError: its nodes carry no shapes (it was not made by ``fxprune.capture``).

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 4)))
        >>> [kernels.name for kernels in graph.kernels.values()]
        ['0.weight', '2.weight']
    """
    refuse_unknown(lower, others)
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"gm: expected a torch.fx.GraphModule from fxprune.capture, got {type(gm).__name__}")
    for node in gm.graph.nodes:
        if "val" not in node.meta:
            raise ValueError(
                f"gm: node {node.name!r} carries no shape; capture the model with fxprune.capture first"
            )
    build = Builder(Parameters.of(gm), own_rules(rules))
    build.samples, build.strict = _samples(gm), strict
    results = Results(build)
    with collector_paused(), replaced_calls():  # for the traces of leaves
        _Walk(gm, build, results).run(None)
    values, constants = results.values()
    name, units, ops = type(gm).__name__, tuple(build.units), tuple(build.ops)
    known = {op.output.index for op in ops}
    twins = {index: x for index, x in build.in_training.items() if index in known and x.index in known}
    found = training_outputs(gm, values, ops), twins, build.parameters.overwritten
    graph = ir.ChannelGraph(ops, build.kernels, build.samples, name, values, constants, units, *found)
    return hold_unknown_statistics(graph, gm)


def _samples(gm: fx.GraphModule) -> int:
    """Batch size of the example inputs: the first axis of the first tensor that is no mere vector."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            for val in leaves(node.meta["val"]):
                if isinstance(val, Tensor) and val.dim() >= 2:
                    return max(1, val.shape[0])
    return 1


def _starts_elsewhere(gm: OpenGraph) -> bool:
    """Whether paths start at float inputs or at look-ups, so that integer inputs are only indices."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            vals = [val for val in leaves(node.meta["val"]) if isinstance(val, Tensor)]
            if any(val.dtype.is_floating_point or val.dtype.is_complex for val in vals):
                return True
        elif node.op == "call_module" and isinstance(
            gm.get_submodule(str(node.target)), (nn.Embedding, nn.EmbeddingBag)
        ):
            return True
        elif node.target in (F.embedding, F.embedding_bag, torch.embedding):
            return True
    return False


class _Walk:
    """One graph being lowered: the network's own (``results`` keeps what its nodes yield), or the inside of
    the module ``leaf``."""

    def __init__(
        self,
        gm: OpenGraph,
        build: Builder,
        results: Results | None,
        path: str = "",
        leaf: nn.Module | None = None,
    ) -> None:
        self.gm, self.build, self.results, self.path, self.leaf = gm, build, results, path, leaf
        self.env: dict[fx.Node, Any] = {}
        self.memory = Memory(gm)

    def run(self, inputs: list[Any] | None) -> Any:
        pending = iter(inputs) if inputs is not None else None
        outer, inner = self.build.node, f"{self.build.inner}." if self.build.inner else ""
        for tensor, sources in overwritten_tensors(self.gm):
            self.build.parameters.overwrite(tensor, sources)
        for node in self.gm.graph.nodes:
            if self.results is not None:
                self.build.node = node.name
            else:
                self.build.node, self.build.inner = outer, inner + node.name
            self.build.layer = self.path
            if node.op == "placeholder":
                val = node.meta["val"]
                self.env[node] = self._input(val) if pending is None else next(pending, val)
            elif node.op == "get_attr":
                self.env[node] = self._attribute(node)
            elif node.op == "output":
                return self._output(self._read(node.args[0]))
            else:
                self.env[node] = self._call(node)
            if self.results is not None:
                self.results.record(node, self.env[node])
            if node.op.startswith("call"):
                self._spread(node)
        return None

    def _input(self, val: Any) -> Any:
        if isinstance(val, Tensor):
            is_index = (
                not val.dtype.is_floating_point and not val.dtype.is_complex and val.dtype != torch.uint8
            )
            return self.build.source(val.shape, live=not is_index or not _starts_elsewhere(self.gm))
        if isinstance(val, (list, tuple)):
            return type(val)(self._input(item) for item in val)
        if isinstance(val, dict):
            return {key: self._input(item) for key, item in val.items()}
        return val

    def _output(self, result: Any) -> Any:
        if self.leaf is None:
            outputs = [x for x in tensors_in(result) if isinstance(x, ir.Value)]
            self.build.ops.append(ir.Sink(self.build.value((), True), tuple(outputs), self.build.node, ""))
        return result

    def _attribute(self, node: fx.Node) -> Any:
        thing = attribute_at(self.gm, str(node.target))
        if not isinstance(thing, Tensor):
            return thing
        ref = self.build.parameters.reference(thing, self.leaf)
        learnt = thing.is_floating_point() and not node.meta.get("is_literal", False)
        name = self.build.parameters.all_names.get(id(thing))
        reads = None if name is None or node.meta.get("is_literal", False) else Reads.of(name, thing.shape)
        return Constant(tuple(thing.shape), thing.dtype, lambda: thing, ref, is_learnt=learnt, reads=reads)

    def _read(self, args: Any) -> Any:
        return fx.node.map_arg(args, lambda node: self.env[node])

    # -- calls ----------------------------------------------------------------------------------------------
    def _call(self, node: fx.Node) -> Any:
        """Lower one call; what raises an error in an unforeseen place becomes opaque, too."""
        val = node.meta["val"]
        if isinstance(val, Tensor) and node.target is not operator.setitem and not val.numel():
            return Constant(tuple(val.shape), val.dtype, lambda: torch.empty(val.shape, dtype=val.dtype))
        before = self.build.state()
        try:
            return self._lowered(node)
        except (Unknown, *FAILURES) as error:
            if self.build.strict:
                raise
            reason = f"lowering {describe(node.target)} raised {described(error)}"
        self.build.restore(before)
        operands = list(tensors_in(self._read((node.args, node.kwargs))))
        if node.target is operator.setitem:
            val = torch.empty(operands[0].shape, device="meta")
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        return self._opaque(operands, val, reason, module)

    def _spread(self, node: fx.Node) -> None:
        """Tell all names of a memory what a node has written to it."""
        if written(node, self.gm) is None:
            return
        before, env = self.build.state(), dict(self.env)
        try:
            self.memory.spread(node, self.env, self.build)
            return
        except FAILURES as error:
            if self.build.strict:
                raise
            reason = f"following what {describe(node.target)} writes raised {described(error)}"
        self.build.restore(before)
        for name in self.memory.names(node):
            operands = list(tensors_in((env[name], env[node])))
            self.env[name] = self._opaque(operands, name.meta["val"], reason)

    def _lowered(self, node: fx.Node) -> Any:
        val = node.meta["val"]
        in_place = node.target is operator.setitem
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not in_place and not gives_tensors(node, module):
            return val
        args, kwargs = self._read(node.args), self._read(node.kwargs)
        if node.target is operator.getitem and isinstance(args[0], (list, tuple, dict)):
            return args[0][args[1]]
        if node.target is getattr and not isinstance(args[0], (ir.Value, Constant)):
            return getattr(args[0], args[1])  # a record that a part made
        target: Any = node.target
        if module is not None:
            self.build.layer = f"{self.path}.{node.target}" if self.path else str(node.target)
            target = dense_class(module)
        operands = list(tensors_in((args, kwargs)))
        result = self.env[node.args[0]] if in_place else val  # type: ignore[index]
        if not any(isinstance(x, ir.Value) for x in operands) and not self._has_kernels(
            target, module, operands
        ):
            return self._fold(node, args, kwargs, result)
        if isinstance(target, type) and module is None:
            # A container made in the forward; a named tuple without the checks of its constructor.
            return target._make(args) if hasattr(target, "_make") and not kwargs else target(*args, **kwargs)
        rule = find_rule(self.build.rules, target) or find_rule(RULES, target)
        if rule is None and module is not None:
            return self._inline(node, module, args, kwargs)
        reason = f"no rule for {describe(target)}"
        if rule is not None:
            if in_place:
                result = torch.empty(result.shape, device="meta")
            before = self.build.state()
            try:
                if find_rule(self.build.rules, target) is None:
                    args, kwargs = positional(args, kwargs)
                return rule(Context(self.build, node, target, result, module), *args, **kwargs)
            except Unknown as error:
                reason = str(error)
                if isinstance(target, AutogradCall):
                    self.build.restore(before)
                    body = FunctionBody(target.function_class)
                    return self._inline(node, body, args, kwargs, reason)
            except FAILURES as error:
                if self.build.strict:
                    raise
                reason = f"rule {rule.__name__} raised {described(error)}"
            self.build.restore(before)
        return self._opaque(operands, result if in_place else val, reason, module)

    def _has_kernels(self, target: Any, module: nn.Module | None, operands: list[Any]) -> bool:
        if any(0 in x.shape for x in operands):
            return False  # the weights of no channels
        if module is not None:
            return isinstance(module, NARROWED) or next(module.parameters(), None) is not None
        return target in KERNEL_TARGETS

    def _fold(self, node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
        """A constant of constants, computed only if somebody needs its numbers."""
        operands = list(tensors_in((args, kwargs)))
        run = functools.partial(getattr(self.memory.calls, node.op), node.target)
        writes = written(node, self.gm) is not None

        @functools.cache
        def evaluate() -> Any:
            def numbers(x: ir.Value | Constant) -> Any:
                known = x.evaluate() if isinstance(x, Constant) else x
                return known.clone() if writes and isinstance(known, Tensor) else known

            if called(node) in DRAWS or isinstance(module, ModeBranch):  # training has other numbers
                unknown_numbers()
            found = run(substitute(args, numbers), substitute(kwargs, numbers))
            return found.zero_() if node.target in EMPTY else found

        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        kind: Any = node.target if module is None else type(module)
        places = {id(leaf): place for place, leaf in enumerate(leaves(result))}
        known = [x for x in operands if isinstance(x, Constant)]
        is_view = kind in MOVES and not writes and bool(known)
        no_numbers = node.target in ZERO
        blank = node.target in EMPTY or (is_view and all(x.is_empty for x in known))
        if isinstance(result, Constant):  # setitem: the changed first argument
            new = changed(result.evaluate, *args[1:])
            return Constant(result.shape, result.dtype, new, reads=reads_after_write(result, *args[1:]))

        def constant(val: Tensor, read: Callable[[], Any], view: TensorFunction | None) -> Constant:
            table = self.build.parameters
            ref = simplified(parameter_view(kind, operands, val, view, table), table)
            return Constant(
                tuple(val.shape),
                val.dtype,
                read,
                ref,
                zero=no_numbers or blank,
                is_empty=blank and val.numel() > 0,
                is_learnt=any(x.is_learnt for x in known),
                joined=joined_weights(kind, args, kwargs, view, val.shape),
                reads=None if no_numbers else reads_of_result(kind, args, kwargs, run, places[id(val)]),
                statistic=statistic_axes(operands, () if node.target in REARRANGES else val.shape),
            )

        return as_constants(result, evaluate, view_of(node, module, operands, args, kwargs), constant)

    def _inline(self, node: fx.Node, module: nn.Module, args: Any, kwargs: Any, reason: str = "") -> Any:
        """Lower the inside of a leaf in place; ``reason`` is given where it cannot be looked at."""
        layer = self.build.layer
        operands = list(tensors_in((args, kwargs)))
        meta_args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        meta_kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
        fast = torch.backends.mha.get_fastpath_enabled()
        # The fused path of nn.TransformerEncoderLayer hides its layers.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            known = leaf_attributes(self.gm, node)
            inner = capture_leaf(module, meta_args, meta_kwargs, known, self.build.leaves)
        except CaptureError as error:
            if isinstance(error, Overwritten):
                for name in error.names:
                    self.build.parameters.overwrite(attribute_at(module, name))
            return self._opaque(operands, node.meta["val"], reason or f"inside of {layer}: {error}", module)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        inputs = bind(inner, args, kwargs)
        place = self.build.node, self.build.inner
        result = _Walk(inner, self.build, None, layer, module).run(inputs)
        self.build.node, self.build.inner = place
        return map_structure(without_numbers, result) if isinstance(module, ModeBranch) else result

    def _opaque(self, operands: list[Any], val: Any, reason: str, module: nn.Module | None = None) -> Any:
        values = [x for x in operands if isinstance(x, ir.Value)]
        parts = [x.reads for x in operands if isinstance(x, Constant) and x.reads is not None]
        state = (*module.parameters(), *module.buffers()) if module is not None else ()
        names = [name for t in state if (name := self.build.parameters.all_names.get(id(t))) is not None]
        reads = lost([*parts, Reads(tuple(names), dict)])

        def build(leaf: Any) -> Any:
            if is_record(leaf):
                made = copy.copy(leaf)
                vars(made).update({name: map_structure(build, item) for name, item in vars(leaf).items()})
                return made
            if not isinstance(leaf, Tensor):
                return leaf
            output = self.build.opaque(values, leaf.shape, reason)
            self.build.read(output, Constant((), torch.float32, lambda: None, reads=reads))
            return output

        return map_structure(build, val)
