"""The tracer: user code runs on shape-only tensors, and everything PyTorch is asked to do becomes a node.

In: the tensors of a model and the inputs' shapes. Out: an ``fx.Graph`` whose nodes carry
``meta["val"]``. Tensors in the traced code are ordinary meta tensors; a table says which node computes
each. Parameters are real: they are swapped for shapes at the moment an operation reads them, so nothing
is allocated and nothing is written.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.overrides import TorchFunctionMode

from fxprune.capture.errors import CaptureError
from fxprune.capture.numbers import TracedFloat, TracedInt, plain
from fxprune.capture.ops import RESHAPING, VALUE_READERS, changes_input, spelling
from fxprune.capture.shadows import Shadows, map_structure

__all__ = ["DtypeOf", "Recorder", "Scope"]

TENSOR_VALUED = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.memory_format,
    torch.layout,
    type(...),
    enum.Enum,
    torch.device,
)
DEVICE_KINDS = {
    f"is_{kind}": kind
    for kind in ("cuda", "cpu", "meta", "mps", "xpu", "xla", "ipu", "mtia", "vulkan", "maia")
}


@dataclasses.dataclass(frozen=True)
class DtypeOf:
    """A type among a node's arguments that may have been read off the tensor which ``source`` computes."""

    source: fx.Node
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Scope:
    """One call of a module: where nodes were made. ``entries`` are its nodes and inner calls, in order."""

    path: str
    kind: type
    parent: Scope | None = None
    entries: list[Any] = dataclasses.field(default_factory=list, repr=False)

    @property
    def chain(self) -> list[str]:
        """The paths of the modules around, outermost first."""
        return [*(self.parent.chain if self.parent else ()), self.path]

    @functools.cached_property
    def stack(self) -> dict[str, tuple[str, type]]:
        """The modules around, outermost first, as fx writes them into ``node.meta["nn_module_stack"]``."""
        outer = self.parent.stack if self.parent else {}
        return {**outer, self.path: (self.path, self.kind)} if self.path else outer


class Recorder(TorchFunctionMode):
    """Records what runs under it. ``names`` maps the ``id`` of the model's tensors to their qualified
    names."""

    def __init__(self, names: dict[int, str], device: torch.device, root: type, shadows: Shadows) -> None:
        super().__init__()
        self.names = names
        self.device = device
        self.shadows = shadows
        self.graph = fx.Graph()
        self.scope = Scope("", root)
        self.recording = True
        self.finished = False
        self.constants: dict[str, Any] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._undo: list[tuple[int, fx.Node | None]] = []
        self._devices: dict[int, Any] = {}
        self._alive: list[Any] = []
        self._live: set[fx.Node] = set()
        self._sizes: dict[tuple[Scope, fx.Node], torch.Size] = {}
        self._dtypes: dict[torch.dtype, Tensor] = {}
        self._grad_modes: list[tuple[bool, fx.Node]] = []

    # -- what the mode sees ---------------------------------------------------------------------------------
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args[0])
        if not self.recording:
            return self.shadows.run(func, args, kwargs)
        if name in VALUE_READERS:
            return self._value(func, args, kwargs)
        if name == "__len__":
            return args[0].shape[0]
        if func is torch._C._set_grad_enabled:
            return self._grad_mode(args[0])
        if func in (_enter_autocast, _exit_autocast):
            return self.effect(func, args)
        op, target, operands = spelling(func, args, kwargs)
        return self.record(op, target, operands, kwargs, lambda: self.shadows.run(func, args, kwargs))

    def record(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        compute: Callable[[], Any],
        writes: bool | None = None,
    ) -> Any:
        """A node for a call; its result, as the traced code is to see it."""
        if target in RESHAPING:
            self._keep_shape(args[0])
        out = compute()
        if op != "call_module" and target is not operator.setitem and not _has_content(out):
            return out
        node = self.node(op, target, args, kwargs)
        writes = changes_input(node) if writes is None else writes
        result = self.wrap(out, node, writes)
        node.meta["val"] = map_structure(plain, result)
        if writes and isinstance(out, Tensor) and isinstance(args[0], Tensor):
            self._register(args[0], node)
        return result

    def number(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Any:
        """A node for arithmetic on sizes."""
        if self.finished or not self.recording:
            return value
        node = self.node("call_function", function, args, {})
        node.meta["val"] = value
        return self._traced(value, node)

    def _property(self, func: Any, tensor: Tensor) -> Any:
        attribute = func.__self__.__name__
        known = id(tensor) in self._nodes
        if not self.recording:
            return func(tensor) if not known or attribute != "requires_grad" else False
        if attribute == "device":
            device = torch.device(str(self.device if known else tensor.device))
            self._devices[id(device)] = tensor
            self._alive.append(device)
            return device
        if attribute == "dtype":
            dtype = func(self.shadows.of(tensor))
            self._dtypes[dtype] = tensor
            return dtype
        if attribute in TENSOR_VALUED:
            return self.record(
                "call_function", getattr, (tensor, attribute), {}, lambda: func(self.shadows.of(tensor))
            )
        if not known:
            return func(tensor)
        if attribute == "shape":
            return self._shape(tensor)
        if attribute in DEVICE_KINDS:
            return self.device.type == DEVICE_KINDS[attribute]
        if attribute == "requires_grad":
            return tensor.is_floating_point() and self._nodes[id(tensor)].op != "placeholder"
        return func(tensor)

    def _shape(self, tensor: Tensor) -> torch.Size:
        owner = self._nodes[id(tensor)]
        if owner not in self._live:
            return tensor.shape
        # Once per module call: two traces read the same shapes in the same places, whatever other
        # modules did.
        key = (self.scope, owner)
        if key not in self._sizes:
            node = self.node("call_function", getattr, (tensor, "shape"), {})
            node.meta["val"] = tensor.shape
            self._sizes[key] = self.wrap(tensor.shape, node, False)
        return self._sizes[key]

    def _value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if id(tensor) in self._nodes or id(tensor) in self.names or tensor.is_meta:
            raise CaptureError(f"{func.__name__.strip('_')}() asks for the numbers in a tensor")
        return func(*args, **kwargs)

    def _grad_mode(self, enabled: bool) -> None:
        setter = torch._C._set_grad_enabled
        previous = torch.is_grad_enabled()
        if self._grad_modes and self._grad_modes[-1][0] == enabled:
            node = self.graph.create_node("call_function", setter, (self._grad_modes.pop()[1],))
        else:
            before = self.node("call_function", torch.is_grad_enabled, (), {})
            before.meta["val"] = previous
            self._grad_modes.append((previous, before))
            node = self.graph.create_node("call_function", setter, (enabled,))
        self._place(node)
        node.meta["val"] = None
        setter(enabled)

    def effect(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """A node for a call made for its effect alone."""
        arguments = tuple([item if isinstance(item, fx.Node) else self.arg(item) for item in args])
        node = self.graph.create_node("call_function", function, arguments)
        node.meta["val"] = None
        self._place(node)
        return node

    # -- nodes ----------------------------------------------------------------------------------------------
    def node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        arguments = tuple([self.arg(item) for item in args])
        options = {key: self.arg(item) for key, item in kwargs.items()}
        node = self.graph.create_node(op, target, arguments, options)
        if any(source in self._live for source in node.all_input_nodes):
            self._live.add(node)
        self._place(node)
        return node

    def _place(self, node: fx.Node) -> None:
        node.meta["nn_module_stack"] = self.scope.stack
        self.scope.entries.append(node)

    def arg(self, value: Any) -> Any:
        """What stands for ``value`` in a node's arguments."""
        if isinstance(value, Tensor):
            return self._source(value)
        if isinstance(value, TracedInt | TracedFloat):
            return value.node
        if isinstance(value, torch.device) and id(value) in self._devices:
            node = self.node("call_function", getattr, (self._devices[id(value)], "device"), {})
            node.meta["val"] = value
            return node
        if isinstance(value, torch.dtype) and value in self._dtypes:
            return DtypeOf(self._source(self._dtypes[value]), value)
        if isinstance(value, (*ATOMS, fx.Node)):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._construct(type(value), tuple(value), {}, value)
        if isinstance(value, tuple):
            return tuple([self.arg(item) for item in value])
        if isinstance(value, list):
            return [self.arg(item) for item in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return self._construct(type(value), (), {name: getattr(value, name) for name in names}, value)
        if isinstance(value, OrderedDict):
            return self._construct(type(value), (list(value.items()),), {}, value)
        if isinstance(value, dict):
            return {key: self.arg(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.arg(value.start), self.arg(value.stop), self.arg(value.step))
        if isinstance(value, range):
            return list(value)
        if hasattr(value, "__index__"):
            return operator.index(value)
        raise CaptureError(f"an argument of type {type(value).__qualname__} has no place in a graph")

    def _construct(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
        node = self.node("call_function", kind, args, kwargs)
        node.meta["val"] = map_structure(plain, value)
        return node

    def _source(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        name = self.names.get(id(tensor))
        if name is None:
            if tensor.is_meta:
                raise CaptureError("a tensor was made by something that cannot be recorded")
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.shadows.of(tensor)
        node.meta["nn_module_stack"] = self.scope.stack
        self._register(tensor, node)
        return node

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
                value = value.detach()
            self._register(value, node)
            return value
        if isinstance(value, int | float):
            return self._traced(value, node)
        if isinstance(value, tuple | list):
            items = [self._part(operator.getitem, node, index, item) for index, item in enumerate(value)]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return type(value)(items)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return type(value)(**{key: self._part(getattr, node, key, item) for key, item in fields.items()})
        if isinstance(value, dict):
            parts = {key: self._part(operator.getitem, node, key, item) for key, item in value.items()}
            return type(value)(parts) if isinstance(value, OrderedDict) else parts
        return value

    def _part(self, function: Callable[..., Any], owner: fx.Node, key: Any, item: Any) -> Any:
        if not _has_content(item):
            return item
        if isinstance(item, int | float) and owner not in self._live:
            return item
        part = self.graph.create_node("call_function", function, (owner, key))
        if owner in self._live:
            self._live.add(part)
        self._place(part)
        result = self.wrap(item, part, False)
        part.meta["val"] = map_structure(plain, result)
        return result

    def _keep_shape(self, tensor: Tensor) -> None:
        """The old shape stays with the old node when an operation changes a tensor's shape in place."""
        node = self._nodes.get(id(tensor))
        if node is not None:
            node.meta["val"] = tensor.detach()

    # -- inputs and output ----------------------------------------------------------------------------------
    def placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> Any:
        """An input of the graph; what the traced code gets for it."""
        node = self.graph.create_node("placeholder", name, default)
        self._place(node)
        node.meta["val"] = value
        if not _has_tensor(value):
            return value
        self._live.add(node)
        result = self.wrap(value, node, False)
        node.meta["val"] = map_structure(plain, result)
        return result

    def output(self, value: Any) -> None:
        node = self.graph.create_node("output", "output", (self.arg(value),))
        self._place(node)
        node.meta["val"] = map_structure(plain, value)
        self.finished = True

    # -- modules --------------------------------------------------------------------------------------------
    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations run in shapes but leave no node."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

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

    def leaf(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A ``call_module`` node."""

        bare = [map_structure(plain, item) for item in args]
        options = {key: map_structure(plain, item) for key, item in kwargs.items()}
        with self.paused():
            out = module.forward(*bare, **options)
        writes = bool(getattr(module, "inplace", False))
        with torch._C.DisableTorchFunction():
            return self.record("call_module", path, args, kwargs, lambda: out, writes)

    def checkpoint(self) -> tuple[fx.Node | None, int, int]:
        last = next(iter(reversed(self.graph.nodes)), None)
        return last, len(self._undo), len(self.scope.entries)

    def rollback(self, mark: tuple[fx.Node | None, int, int]) -> None:
        """Forget what was recorded since ``checkpoint`` returned ``mark``."""
        for node in list(reversed(self.graph.nodes)):
            if node is mark[0]:
                break
            self.graph.erase_node(node)
        for key, node in reversed(self._undo[mark[1] :]):
            if node is None:
                del self._nodes[key]
            else:
                self._nodes[key] = node
        del self._undo[mark[1] :], self.scope.entries[mark[2] :]
        self._sizes.clear()


def _has_content(value: Any) -> bool:
    """Whether there is a tensor or a number in a result."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    if isinstance(value, tuple | list):
        return any(_has_content(item) for item in value)
    if isinstance(value, dict):
        return any(_has_content(item) for item in value.values())
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(_has_tensor(item) for item in value.values())
    return isinstance(value, Tensor)
