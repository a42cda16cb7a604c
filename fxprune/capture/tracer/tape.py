"""The graph under construction, and which of its nodes computes what the traced code holds.

In: calls and their results, as they happen. Out: an ``fx.Graph`` whose nodes carry ``meta["val"]``. Tensors
are known by identity; sizes are numbers that carry their node.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import CaptureError
from fxprune.capture.recompute import OpenRegions
from fxprune.capture.tracer.call_targets import ObjectOf
from fxprune.capture.tracer.contents import ATOMS, LITERALS, has_content, has_tensor, is_record, length
from fxprune.capture.tracer.entries import Decision, DtypeOf, Scope
from fxprune.capture.tracer.memos import Memos
from fxprune.capture.tracer.meta_values import Shadows, map_structure
from fxprune.capture.tracer.spelling import changes_input
from fxprune.capture.tracer.traced_numbers import TracedFloat, TracedInt, plain_number
from fxprune.capture.tracer.type_names import NUMBER_TYPES
from fxprune.capture.tracer.values import Values
from fxprune.capture.tracer.whole_numbers import Namespaces

__all__ = ["Tape"]


class Tape:
    """``names`` maps the ``id`` of the model's tensors to their qualified names; ``memos`` may have more."""

    def __init__(
        self,
        names: dict[int, str],
        root: type,
        shadows: Shadows,
        memos: Memos | None = None,
        values: Values | None = None,
    ) -> None:
        self.names = names
        self.shadows = shadows
        self.memos, self.values = memos or Memos(), values or Values()
        self.graph = fx.Graph()
        self.scope = Scope("", root)
        self.running = True
        self.constants: dict[str, Any] = {}
        self.decisions: list[Decision] = []
        self.devices: dict[int, Tensor] = {}
        self.dtypes: dict[torch.dtype, Tensor] = {}
        self.unsized: set[fx.Node] = set()  # their results are as long as the numbers in some tensor say
        self.reads: list[fx.Node] = []
        self.overwritten: list[str] = []  # parameters, see `record_assignment`
        self.integers: dict[str, Tensor] = {}  # of the model that are no state: they do not change
        self._nodes: dict[int, fx.Node] = {}
        self._undo: list[tuple[int, fx.Node | None]] = []
        self._alive: list[Any] = []
        self._live: set[fx.Node] = set()
        self._sizes: dict[tuple[Scope, fx.Node], torch.Size] = {}
        self.regions = OpenRegions()
        self.namespaces = Namespaces()

    # -- what happened --------------------------------------------------------------------------------------
    def record(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        writes: bool | None = None,
        *,
        unsized: bool = False,
    ) -> Any:
        """A node for a call that gave ``out``; the result as the traced code is to see it."""
        if op != "call_module" and target is not operator.setitem and not has_content(out):
            return out
        node = self.node(op, target, args, kwargs)
        writes = changes_input(node) if writes is None else writes
        longs = [n.meta["val"] for n in node.all_input_nodes if n in self.unsized]
        if unsized or (isinstance(out, int) and longs) or any(length(val) == length(out) for val in longs):
            self.unsized.add(node)
        result = self.wrap(out, node, writes)
        node.meta["val"] = map_structure(plain_number, result)
        if writes and isinstance(out, Tensor) and isinstance(args[0], Tensor):
            self._register(args[0], node)
        return result

    def number(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any:
        """A node for arithmetic on sizes."""
        if not self.running:
            return value
        node = self.node("call_function", function, args, {})
        if any(source in self.unsized for source in node.all_input_nodes):
            self.unsized.add(node)
        node.meta["val"] = value
        return self._traced(value, node)

    def decided(self, function: Callable[..., Any], number: Any, other: Any, result: bool) -> bool:
        """A comparison of sizes: the graph holds where it comes out the same."""
        other_node = getattr(other, "node", None)
        if other_node is number.node:
            return result  # as for every number
        if self.running and (number.node in self.unsized or other_node in self.unsized):
            return self.values.compared(self, function, (number, other))
        if self.running:
            self.decisions.append(Decision(function, number.node, self.arg(other), result, self.scope.path))
        return result

    def made_plain(self, number: Any) -> None:
        """Code makes a plain number of one: what was read from data is checked."""
        if self.running and number.node in self.unsized:
            self.values.made_plain(self, number)
        elif self.running:
            self.namespaces.meet(number)

    def read(self, name: str, tensor: Tensor, found: Any) -> fx.Node:
        """A node that reads numbers, which are ``found`` here."""
        node = self.node("call_method", name, (tensor,), {})
        node.meta["val"] = found
        self._live.add(node)
        self.unsized.add(node)
        return node

    def numbers(self, node: fx.Node) -> Any:
        """Return the result of a node of :meth:`read` in numbers that carry nodes."""
        self.reads.append(node)
        return self.wrap(node.meta["val"], node, False)

    def effect(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """A node for a call made for its effect alone."""
        node = self.graph.create_node("call_function", function, tuple(self.arg(item) for item in args))
        node.meta["val"] = None
        self.place(node)
        return node

    def shape(self, tensor: Tensor) -> torch.Size:
        """The shape of a tensor, in numbers that carry nodes if it depends on the inputs."""
        owner = self._nodes[id(tensor)]
        if owner not in self._live:
            return tensor.shape
        # Once per module call: two traces read the same shapes in the same places, whatever others did.
        key = (self.scope, owner)
        if key not in self._sizes:
            node = self.node("call_function", getattr, (tensor, "shape"), {})
            node.meta["val"] = tensor.shape
            self._sizes[key] = self.wrap(tensor.shape, node, False)
            if owner in self.unsized and tensor.dim():
                length: Any = self._sizes[key][0]
                self.unsized.add(length.node)
        return self._sizes[key]

    def keep_shape(self, tensor: Tensor) -> None:
        """The old shape stays with the old node when an operation changes a tensor's shape in place."""
        node = self._nodes.get(id(tensor))
        if node is not None:
            node.meta["val"] = tensor.detach()

    def find(self, tensor: Tensor) -> fx.Node | None:
        return self._nodes.get(id(tensor))

    def forget(self, tensor: Tensor) -> None:
        """Read an attribute of the model anew where it is used next: it holds something else by then."""
        self._undo.append((id(tensor), self._nodes.pop(id(tensor), None)))

    def rename(self, tensor: Tensor, other: Tensor) -> None:
        """Let a tensor stand for the node of another one from now on."""
        self._register(tensor, self._source(other))

    def note_device(self, device: torch.device, tensor: Tensor) -> None:
        """This very object was read off ``tensor``: where it is an argument, that reading is one."""
        self.devices[id(device)] = tensor
        self._alive.append(device)

    def device_kind(self, name: str) -> Any:
        """A node for the kind of device that the first input is on; ``name`` if there is no input."""
        for tensor in self._alive:
            node = self._nodes.get(id(tensor)) if isinstance(tensor, Tensor) else None
            if node in self._live:
                device = self.node("call_function", getattr, (node, "device"), {})
                kind = self.node("call_function", getattr, (device, "type"), {})
                device.meta["val"], kind.meta["val"] = torch.device(name), name
                return kind
        return name

    # -- nodes ----------------------------------------------------------------------------------------------
    def node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        arguments = tuple([self.arg(item) for item in args])
        options = {key: self.arg(item) for key, item in kwargs.items()}
        node = self.graph.create_node(op, target, arguments, options)
        if any(source in self._live for source in node.all_input_nodes):
            self._live.add(node)
        self.place(node)
        return node

    def place(self, node: fx.Node) -> None:
        node.meta["nn_module_stack"] = self.scope.stack
        if self.regions.current is not None:
            node.meta["checkpoint"] = self.regions.current
        self.scope.entries.append(node)

    def arg(self, value: Any) -> Any:
        """Return what stands for ``value`` in a node's arguments."""
        if isinstance(value, Tensor):
            return self._source(value)
        if isinstance(value, TracedInt | TracedFloat):
            return value.node
        if isinstance(value, torch.device) and self._known(self.devices.get(id(value))):
            node = self.node("call_function", getattr, (self.devices[id(value)], "device"), {})
            node.meta["val"] = value
            return node
        if isinstance(value, torch.dtype) and self._known(self.dtypes.get(value)):
            return DtypeOf(self._source(self.dtypes[value]), value)
        if isinstance(value, float) and type(value) is not float:
            return float(value)  # NumPy's numbers spell themselves by a name that no code of a graph knows
        if isinstance(value, ATOMS):
            return value
        return self._built(value)

    def _built(self, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._construct(type(value), tuple(value), {}, value)
        if isinstance(value, tuple):
            return tuple([self.arg(item) for item in value])
        if isinstance(value, list | range):
            return [self.arg(item) for item in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.init]
            return self._construct(type(value), (), {name: getattr(value, name) for name in names}, value)
        if isinstance(value, OrderedDict):
            return self._construct(type(value), (list(value.items()),), {}, value)
        if isinstance(value, dict):
            return {key: self.arg(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.arg(value.start), self.arg(value.stop), self.arg(value.step))
        if isinstance(value, type) and value in NUMBER_TYPES and not self.namespaces.gave_up:
            return NUMBER_TYPES[value]  # else its module stays whole, and `int` fixes no size of the graph
        if hasattr(value, "__index__"):
            with suppress(TypeError):  # an array of more than one number
                return operator.index(value)
        if is_record(value):
            return self._construct(ObjectOf(type(value)), (), vars(value), value)
        raise CaptureError(f"an argument of type {type(value).__qualname__} has no place in a graph")

    def _construct(
        self, kind: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> fx.Node:
        node = self.node("call_function", kind, args, kwargs)
        node.meta["val"] = map_structure(plain_number, value)
        return node

    def _known(self, tensor: Tensor | None) -> bool:
        """Whether there is a node for a tensor, or could be: not if the part that made it was forgotten."""
        return tensor is not None and (id(tensor) in self._nodes or id(tensor) in self.names)

    def _source(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        name = self.names.get(id(tensor))
        if name is None:
            if tensor.is_meta:
                node = self.memos.recomputed(tensor, self.graph, self._source, self.place)
                if node is None:
                    raise CaptureError("a tensor was made by something that cannot be recorded")
                self._register(tensor, node)
                return node
            taken = {*self.names.values(), *self.constants}
            name = next(n for i in range(len(taken) + 1) if (n := f"_tensor_constant{i}") not in taken)
            self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.shadows.of(tensor)
        node.meta["nn_module_stack"] = self.scope.stack
        node.meta["is_literal"] = name in self.constants  # neither parameter nor buffer: a number in the code
        self._register(tensor, node)
        return node

    # -- values ---------------------------------------------------------------------------------------------
    def _register(self, tensor: Tensor, node: fx.Node) -> None:
        self._undo.append((id(tensor), self._nodes.get(id(tensor))))
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _traced(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or node not in self._live:
            return value
        number: Any = TracedInt(value) if isinstance(value, int) else TracedFloat(value)
        number.node, number.recorder = node, self
        return number

    def wrap(self, value: Any, node: fx.Node, writes: bool) -> Any:
        """The result of ``node`` with a node known for every tensor and number in it."""
        if isinstance(value, Tensor):
            if not value.is_meta:
                value = self.shadows.of(value)
            if id(value) in self._nodes and not writes:
                # The operation returned its input: from now on there are two names for it.
                value = value.detach()
            self._register(value, node)
            return value
        if isinstance(value, int | float):
            return self._traced(value, node)
        if isinstance(value, tuple | list):
            items = [self._part(operator.getitem, node, index, item) for index, item in enumerate(value)]
            kind: Any = type(value)
            return kind._make(items) if hasattr(value, "_fields") else kind(items)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init
            }
            return type(value)(**{key: self._part(getattr, node, key, item) for key, item in fields.items()})
        if isinstance(value, dict):
            parts = {key: self._part(operator.getitem, node, key, item) for key, item in value.items()}
            return type(value)(parts) if isinstance(value, OrderedDict) else parts
        if is_record(value):
            return ObjectOf(type(value))(
                **{k: self._part(getattr, node, k, v) for k, v in vars(value).items()}
            )
        return value

    def _part(self, function: Callable[..., Any], owner: fx.Node, key: Any, item: Any) -> Any:
        if not has_content(item) or (isinstance(item, int | float) and owner not in self._live):
            return item
        part = self.node("call_function", function, (owner, key), {})
        if owner in self.unsized:
            self.unsized.add(part)
        result = self.wrap(item, part, False)
        part.meta["val"] = map_structure(plain_number, result)
        return result

    # -- inputs and output ----------------------------------------------------------------------------------
    def placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        """An input of the graph; what the traced code gets for it."""
        if default and not isinstance(default[0], LITERALS):
            # No code can be written for such a default: the argument is a constant of the graph.
            return value
        if not default and any(node.op == "placeholder" and node.args for node in self.graph.nodes):
            # Python wants a default after a default; this one was a keyword, or one of a variable number.
            default = (None,)
        node = self.graph.create_node("placeholder", name, default)
        self.place(node)
        node.meta["val"] = value
        if not has_tensor(value):
            return value
        self._live.add(node)
        self.values.give(node, value)
        result = self.wrap(value, node, False)
        node.meta["val"] = map_structure(plain_number, result)
        return result

    def output(self, value: Any) -> None:
        node = self.graph.create_node("output", "output", (self.arg(value),))
        self.place(node)
        node.meta["val"] = map_structure(plain_number, value)
        self.running = False

    def finished(self) -> Memos:
        """Give what was computed, from the model's own tensors alone or not, for a run that finds it."""
        fixed = {key: node for key, node in self._nodes.items() if node not in self._live}
        return Memos(fixed, self._alive, self.constants, self._nodes)

    # -- where ----------------------------------------------------------------------------------------------
    @contextmanager
    def inside(self, path: str, module: nn.Module) -> Iterator[None]:
        """Nodes made here belong to a call of ``module``."""
        outer = self.scope
        self.scope = Scope(path, type(module), outer)
        outer.entries.append(self.scope)
        try:
            yield
        finally:
            self.scope = outer

    def checkpoint(self) -> tuple[fx.Node | None, int, int, int, int]:
        last = next(iter(reversed(self.graph.nodes)), None)
        regions = len(self.regions.keys)
        return last, len(self._undo), len(self.scope.entries), len(self.decisions), regions

    def rollback(self, start: tuple[fx.Node | None, int, int, int, int]) -> None:
        """Forget what was recorded since ``checkpoint`` returned ``start``."""
        for node in list(reversed(self.graph.nodes)):
            if node is start[0]:
                break
            self.graph.erase_node(node)
            if node in self.reads:
                self.reads.remove(node)
        for key, before in reversed(self._undo[start[1] :]):
            if before is None:
                del self._nodes[key]
            else:
                self._nodes[key] = before
        del self._undo[start[1] :], self.scope.entries[start[2] :], self.decisions[start[3] :]
        del self.regions.keys[start[4] :]
        self._sizes.clear()
