"""The tracer: user code runs on shape-only tensors, and everything PyTorch is asked to do goes on the tape.

In: the code of a model, running. Out: a :class:`Tape`. Tensors in the traced code are ordinary meta
tensors. Parameters are real: they are swapped for shapes at the moment an operation reads them, so nothing is
allocated and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxprune.capture.errors import TRACE_ERRORS, CaptureError
from fxprune.capture.tracer.assigned_data import record_assignment
from fxprune.capture.tracer.call_targets import MethodCall
from fxprune.capture.tracer.meta_values import META, map_structure
from fxprune.capture.tracer.packed import is_packed, packed_results, packed_shapes, padded_shapes
from fxprune.capture.tracer.sample_values import MadeUp, has_no_shapes, needs_numbers
from fxprune.capture.tracer.spelling import (
    CONSTRUCTORS,
    RESHAPING,
    VALUE_READERS,
    selects,
    spelling,
)
from fxprune.capture.tracer.tape import Tape
from fxprune.capture.tracer.traced_numbers import plain_number
from fxprune.capture.tracer.type_names import TypeName, dtype_of
from fxprune.torch_private import DisableTorchFunction, enter_autocast, exit_autocast, set_grad_mode

__all__ = ["Recorder"]

TENSOR_VALUED = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
APART = (torch.device, torch.autograd.grad, Tensor.type)
"""What gives no tensor, or is recorded as something else."""
NUMBERS = frozenset(("item", "tolist", "__int__", "__index__", "__float__"))
DEVICE_KINDS = {f"is_{kind}": kind for kind in ("cuda", "cpu", "meta", "mps", "xpu", "xla", "ipu", "mtia")}


class Recorder(TorchFunctionMode):
    """Puts what runs under it on ``tape``; the code believes its tensors to be on ``device``."""

    def __init__(self, tape: Tape, device: torch.device) -> None:
        super().__init__()
        self.tape = tape
        self.device = device
        self._grad_modes: list[tuple[bool, fx.Node]] = []
        self._by_numbers = False
        # Inside of a transform of torch.func, and the mode that records beneath it.
        self.transformed = False
        self.beneath: Any = None
        tape.shadows.numbers = self._numbers

    @property
    def recording(self) -> bool:
        return self.tape.running

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, args, kwargs = _without_arrays(func, args, kwargs or {})
        name = getattr(func, "__name__", "")
        if self.transformed:
            return self._under_transform(func, name, args, kwargs)
        if name == "__get__":
            return self._property(func, args[0])
        if name == "__set__" and self.recording:
            if func.__self__.__name__ == "data":
                return record_assignment(self.tape, *args)
            func = _assignment(func, self.tape.find(args[0]))
        if name in VALUE_READERS:
            return self._read(func, name, args, kwargs)
        if func in APART:
            return self._apart(func, args, kwargs)
        if not self.recording:
            return self._unrecorded(func, args, kwargs)
        if name == "unbind" and 0 in (*args[1:2], kwargs.get("dim")) and not self.tape.values.reached:
            self._check_length(args[0], name)
        if name == "__len__":
            return plain_number(self.length(args[0]))
        if func in (set_grad_mode, enter_autocast, exit_autocast):
            return self._region(func, args)
        op, target, operands = spelling(func, args, kwargs)
        if name in ("_pack_padded_sequence", "_pad_packed_sequence"):
            out = self._sequences(name, args)
            return self.tape.record(op, target, operands, kwargs, out, unsized=True)
        if target in RESHAPING:
            self.tape.keep_shape(args[0])
        self._by_numbers = False
        try:
            out = self.tape.shadows.run(func, args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if not (selects(func, args) and needs_numbers(error)) and not has_no_shapes(error):
                raise
            return self._made_up(op, target, func, operands, kwargs, args)
        return self.tape.record(op, target, operands, kwargs, out, unsized=self._by_numbers)

    def _apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.device:  # of a device: the same one, which may have been read off a tensor
            (device,) = args if len(args) == 1 and not kwargs else (None,)
            return device if isinstance(device, torch.device) else func(*args, **kwargs)
        return self._typed(args, kwargs) if func is Tensor.type else self._gradients(args, kwargs)

    def _typed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Name the type of a tensor, or change it to one that is given by its name or its class."""
        tensor, kind = args[0], args[1] if args[1:] else kwargs.get("dtype")
        if kind is None:
            return TypeName.of(tensor, self.device)
        if isinstance(kind, TypeName):
            return self.__torch_function__(Tensor.type_as, (), (tensor, kind.tensor))
        if isinstance(kind, torch.dtype):
            return self.__torch_function__(Tensor.to, (), (tensor, kind))
        out = self.tape.shadows.run(Tensor.to, (tensor, dtype_of(kind)), {})
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
        return self.tape.record("call_method", "type", (tensor, name), {}, out) if self.recording else out

    def _unrecorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result in shapes, of made-up numbers where PyTorch has none for shapes alone."""
        try:
            return self.tape.shadows.run(func, args, kwargs)
        except NotImplementedError as error:
            if not has_no_shapes(error):
                raise
            found = self._on_numbers(func, args, kwargs, MadeUp(example=self._example))
            return map_structure(_meta_of, found)

    def _under_transform(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call on wrapped tensors as it is; what it does to plain ones is recorded beneath."""
        if name in VALUE_READERS:
            raise CaptureError(f"{name.strip('_')}() asks for the numbers in a tensor")

        def argument(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.twin(value)
            return META if isinstance(value, torch.device) else plain_number(value)

        given = [map_structure(argument, arg) for arg in args]
        options = {key: map_structure(argument, arg) for key, arg in kwargs.items()}
        if options.get("device") is not None or func in CONSTRUCTORS:
            options["device"] = META
        return func(*given, **options)

    def twin(self, tensor: Tensor) -> Tensor:
        """The shape of a tensor, which the tape knows by the tensor's node from now on."""
        twin = self.tape.shadows.of(tensor)
        if twin is not tensor and self.beneath is not None:
            self.tape.rename(twin, tensor)
        return twin

    def _numbers(self, tensor: Tensor) -> Tensor:
        """The number in a tensor that says how long a result is: known, or that of the example.

        Raises:
            CaptureError: no example tells it.
        """
        try:
            return self.tape.shadows.value(tensor).cpu()
        except CaptureError:
            node = self.tape.find(tensor)
            found: Any = self.tape.values.example(self.tape, node, shapes=True)
            if found is None:
                found = self.tape.values.example(self.tape, node)
                self._by_numbers = True
            if not isinstance(found, Tensor):
                raise
            return found

    def _read(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the numbers in a tensor to code that asks for them."""
        try:
            tensor = self.tape.shadows.value(args[0], name)
        except CaptureError:
            if not self.recording:
                raise
            if name == "__bool__":
                return self.tape.values.truth(self.tape, args[0])
            if self.tape.values.answers.on_trial:  # as an error is worded
                tensor = self.tape.values.answers.made_up(MadeUp().of(args[0]))
            elif name in NUMBERS:
                return self.tape.values.read(self.tape, args[0], name)
            else:
                raise
        return func(tensor, *args[1:], **kwargs)

    def _sequences(self, name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """The shapes of packed sequences, or of those that were padded again."""
        if name == "_pad_packed_sequence":
            total = plain_number(args[4])
            with DisableTorchFunction():
                length = args[1].shape[0]
                return padded_shapes(args[0], args[1], total if total > 0 else length, batch_first=args[2])
        lengths = self.tape.values.example(self.tape, self.tape.arg(args[1]))
        with DisableTorchFunction():
            longest = args[0].shape[1 if args[2] else 0] if lengths is None else int(lengths.max())
            return packed_shapes(args[0], longest, batch_first=args[2])

    def _gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for ``torch.autograd.grad``, which gives a tensor like each of the inputs."""
        inputs = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        with DisableTorchFunction():
            out = tuple(torch.empty_like(self.tape.shadows.of(x)) for x in inputs)
            return self.tape.record("call_function", torch.autograd.grad, args, kwargs, out)

    def length(self, tensor: Tensor) -> Any:
        """Return the number of a tensor's rows, one that is traced."""
        self._check_length(tensor, "len")
        return tensor.shape[0]

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

    def _region(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Record where a region without gradients, or of another precision, begins or ends."""
        if func is set_grad_mode:
            return self._grad_mode(args[0])
        return self.enter_autocast(*args) if func is enter_autocast else self.tape.effect(func, args)

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
    def resumed(self) -> Iterator[None]:
        """Operations leave nodes, inside of :meth:`paused`."""
        before, self.tape.running = self.tape.running, True
        try:
            yield
        finally:
            self.tape.running = before

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
                if is_packed(module, args):
                    with DisableTorchFunction():
                        out = packed_results(module, args[0])
                        return self.tape.record("call_module", path, args, kwargs, out)
                options = {key: map_structure(plain_number, item) for key, item in kwargs.items()}
                out = module.forward(*[map_structure(plain_number, item) for item in args], **options)
            except TRACE_ERRORS as error:
                try:
                    return self._made_up("call_module", path, module.forward, args, kwargs)
                except TRACE_ERRORS:
                    raise error from None
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
                out = self._on_numbers(function, args, kwargs, MadeUp(example=self._example))
                sizes = True
            else:
                out = self._on_numbers(function, given, kwargs, MadeUp(masks=True, example=self._example))
                other = self._on_numbers(function, given, kwargs, MadeUp(example=self._example))
                sizes = selects(function, given) or _sizes(out) != _sizes(other)
        with DisableTorchFunction():
            out = map_structure(_at_least_one, out)
            return self.tape.record(op, target, args, kwargs, out, unsized=sizes)

    def _example(self, tensor: Tensor) -> Any:
        """The numbers that the example gives a tensor; None if they depend on others."""
        return self.tape.values.example(self.tape, self.tape.find(tensor))

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


def _without_arrays(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A call that makes a tensor of an array of NumPy, as one on a constant; other calls as they are.

    The numbers of the array are those of the code; the tensor has memory of its own.
    """
    if func not in (torch.tensor, torch.as_tensor) or not isinstance(args[0] if args else None, np.ndarray):
        return func, args, kwargs
    return torch.asarray, (torch.from_numpy(args[0].copy()),), {**kwargs, "copy": True}


def _assignment(setter: Any, node: fx.Node | None) -> Any:
    """The method that does what an assignment to an attribute of a tensor does, or its setter.

    Of a tensor that was detached, gradients are asked for in the forward; of any other, for its user's sake.
    """
    name = setter.__self__.__name__
    if name == "grad":
        raise CaptureError("it assigns the .grad of a tensor")
    detached = node is not None and getattr(node.target, "__name__", node.target) == "detach"
    return Tensor.requires_grad_ if name == "requires_grad" and detached else setter


def _sizes(value: Any) -> list[Any]:
    """The shapes of all tensors in a value."""
    found: list[Any] = []
    map_structure(lambda x: found.append(x.shape if isinstance(x, Tensor) else None), value)
    return found


def _meta_of(value: Any) -> Any:
    """A tensor without its numbers."""
    return value.to(META) if isinstance(value, Tensor) else value


def _at_least_one(value: Any) -> Any:
    """Replace an empty tensor, which made-up numbers gave, by zeros of size one along its empty axes."""
    if not isinstance(value, Tensor) or value.numel():
        return value
    return value.new_zeros([max(1, size) for size in value.shape])
