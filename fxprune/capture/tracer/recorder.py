"""The tracer: user code runs on shape-only tensors, and everything PyTorch is asked to do goes on the tape.

In: the code of a model, running. Out: a :class:`Tape`. Tensors in the traced code are ordinary meta
tensors. Parameters are real: they are swapped for shapes at the moment an operation reads them, so nothing is
allocated and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxprune.capture.errors import TRACE_ERRORS, CaptureError
from fxprune.capture.tracer.call_targets import MethodCall
from fxprune.capture.tracer.meta_values import map_structure
from fxprune.capture.tracer.sample_values import MadeUp, needs_numbers
from fxprune.capture.tracer.spelling import RESHAPING, VALUE_READERS, selects, spelling
from fxprune.capture.tracer.tape import Tape
from fxprune.capture.tracer.traced_numbers import plain_number
from fxprune.torch_private import DisableTorchFunction, enter_autocast, exit_autocast, set_grad_mode

__all__ = ["Recorder"]

TENSOR_VALUED = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
DEVICE_KINDS = {f"is_{kind}": kind for kind in ("cuda", "cpu", "meta", "mps", "xpu", "xla", "ipu", "mtia")}


class Recorder(TorchFunctionMode):
    """Puts what runs under it on ``tape``; the code believes its tensors to be on ``device``."""

    def __init__(self, tape: Tape, device: torch.device) -> None:
        super().__init__()
        self.tape = tape
        self.device = device
        self._grad_modes: list[tuple[bool, fx.Node]] = []

    @property
    def recording(self) -> bool:
        return self.tape.running

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args[0])
        if name == "__set__" and self.recording and func.__self__.__name__ in ("data", "grad"):
            raise CaptureError(f"it assigns the .{func.__self__.__name__} of a tensor")
        if name in VALUE_READERS:
            return func(self.tape.shadows.value(args[0], name), *args[1:], **kwargs)
        if not self.recording:
            return self.tape.shadows.run(func, args, kwargs)
        if name == "__len__" or (name == "unbind" and 0 in (*args[1:2], kwargs.get("dim"))):
            self._check_length(args[0], name)
        if name == "__len__":
            return plain_number(args[0].shape[0])
        if func is set_grad_mode:
            return self._grad_mode(args[0])
        if func is enter_autocast:
            return self.enter_autocast(*args)
        if func is exit_autocast:
            return self.tape.effect(func, args)
        op, target, operands = spelling(func, args, kwargs)
        if target in RESHAPING:
            self.tape.keep_shape(args[0])
        try:
            out = self.tape.shadows.run(func, args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if not selects(func, args) or not needs_numbers(error):
                raise
            return self._made_up(op, target, func, operands, kwargs, args)
        return self.tape.record(op, target, operands, kwargs, out)

    def _check_length(self, tensor: Tensor, name: str) -> None:
        if self.tape.find(tensor) in self.tape.unsized:
            raise CaptureError(
                f"{name.strip('_')}() asks for the numbers in a tensor: they decide its length"
            )

    def _property(self, func: Any, tensor: Tensor) -> Any:
        attribute = func.__self__.__name__
        node = self.tape.find(tensor)
        if not self.recording:
            return func(tensor)
        if attribute == "device":
            device = torch.device(str(self.device if node or tensor.is_meta else tensor.device))
            self.tape.note_device(device, tensor)
            return device
        if attribute == "dtype":
            dtype = func(self.tape.shadows.of(tensor))
            self.tape.dtypes[dtype] = tensor
            return dtype
        if attribute in TENSOR_VALUED:
            out = func(self.tape.shadows.of(tensor))
            return self.tape.record("call_function", getattr, (tensor, attribute), {}, out)
        if node is None:
            return func(tensor)
        if attribute == "shape":
            return self.tape.shape(tensor)
        if attribute in DEVICE_KINDS:
            return self.device.type == DEVICE_KINDS[attribute]
        if attribute == "requires_grad":
            return tensor.is_floating_point() and node.op != "placeholder"
        return func(tensor)

    def _grad_mode(self, enabled: bool) -> None:
        """Regions without gradients: their end goes back to what was there when the graph runs."""
        setter = set_grad_mode
        if self._grad_modes and self._grad_modes[-1][0] == enabled:
            self.tape.effect(setter, (self._grad_modes.pop()[1],))
        else:
            previous = torch.is_grad_enabled()
            before = self.tape.effect(torch.is_grad_enabled, ())
            before.meta["val"] = previous
            self._grad_modes.append((previous, before))
            self.tape.effect(setter, (enabled,))
        setter(enabled)

    def enter_autocast(self, device: str, *options: Any) -> fx.Node:
        """A region for the kind of device that the model runs on follows the model to another one."""
        kind = self.tape.device_kind(device) if device == self.device.type else device
        return self.tape.effect(enter_autocast, (kind, *options))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations run in shapes but leave no node."""
        before, self.tape.running = self.tape.running, False
        try:
            yield
        finally:
            self.tape.running = before

    def leaf(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A ``call_module`` node. Hooks of the module that were not traced run with the graph, not here."""
        with self.paused():
            try:
                options = {key: map_structure(plain_number, item) for key, item in kwargs.items()}
                out = module.forward(*[map_structure(plain_number, item) for item in args], **options)
            except TRACE_ERRORS as error:
                if not needs_numbers(error):
                    raise
                return self._made_up("call_module", path, module.forward, args, kwargs)
        writes = bool(getattr(module, "inplace", False))
        with DisableTorchFunction():
            return self.tape.record("call_module", path, args, kwargs, out, writes)

    def method(self, target: MethodCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A ``call_function`` node for a method whose result depends on numbers."""
        return self._made_up("call_function", target, target, args, kwargs)

    def _made_up(
        self, op: str, target: Any, function: Callable[..., Any], args: Any, kwargs: Any, given: Any = None
    ) -> Any:
        """A node for what looks at its data; how long its results are is not to be relied upon.

        ``given``: the arguments of ``function`` where those of the node stand in another order.
        """
        with self.paused():
            if given is None:
                out = self._on_numbers(function, args, kwargs, MadeUp())
            else:
                out = self._on_numbers(function, given, kwargs, MadeUp(masks=True))
        with DisableTorchFunction():
            out = map_structure(_at_least_one, out)
            return self.tape.record(op, target, args, kwargs, out, unsized=True)

    def _on_numbers(self, function: Callable[..., Any], args: Any, kwargs: Any, numbers: MadeUp) -> Any:
        """The result for made-up data; only its shapes matter."""
        shadows = self.tape.shadows

        def argument(value: Any) -> Any:
            return numbers.of(value) if isinstance(value, Tensor) else plain_number(value)

        self.tape.shadows = numbers
        try:
            with DisableTorchFunction():
                given = [map_structure(argument, item) for item in args]
                options = {key: map_structure(argument, item) for key, item in kwargs.items()}
            return function(*given, **options)
        finally:
            self.tape.shadows = shadows


def _at_least_one(value: Any) -> Any:
    """Replace an empty tensor, which made-up numbers gave, by zeros of size one along its empty axes."""
    if not isinstance(value, Tensor) or value.numel():
        return value
    return value.new_zeros([max(1, size) for size in value.shape])
