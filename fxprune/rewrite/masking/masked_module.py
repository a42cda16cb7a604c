"""Masked modules: subclasses of a module's own class whose forward multiplies weights by masks.

The module keeps its object, its parameters and its place in the model; only ``module.__class__`` changes. The
mask is a bool buffer beside the parameter, named ``<parameter>_mask``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.capture.leaves import dense_class
from fxprune.capture.tracer.replacing import replaced
from fxprune.rewrite.masking.averages import note, watch
from fxprune.rewrite.masking.optimizer_hook import enrol
from fxprune.rewrite.masking.sharded import plain_class
from fxprune.rewrite.masking.state_dict import adapt
from fxprune.rewrite.masking.storage import SUFFIX, clean
from fxprune.rewrite.masking.weight_functions import KERNELS, weight_operand, with_weight_operand
from fxprune.torch_private import load_module_state

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Form:
    """Describe how the forward of a masked module applies its masks.

    ``stock``: the module's own forward is torch's, and ``weight`` is multiplied on its way in.
    ``reads``: the original forward runs unchanged, and every torch function in it that is given one of the
    parameters ``targets`` (relative dotted names) is given the masked one instead. The weight operand of a
    convolution or linear call whose shape is that of a parameter in ``operands`` is masked once more:
    weight standardisation moves the zeros away from zero.
    ``frozen``: the original forward runs, but that operand *is* the parameter in ``operands`` (no masks).
    ``keep``: nobody calls this module, or a graph masks its parameters; only its state is looked after.
    """

    kind: Literal["stock", "reads", "frozen", "keep"]
    targets: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()


def form_of(module: nn.Module) -> Form | None:
    """The form of a masked (or frozen) module, None for any other."""
    form: Form | None = getattr(type(module), "masked_form", None)
    return form


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was masked, and before ``fully_shard``."""
    return dense_class(module) if form_of(module) is not None else plain_class(type(module))


def is_stock(base: type[nn.Module]) -> bool:
    """Whether torch's own code, and nothing of a subclass, carries ``weight`` to the kernel."""
    if issubclass(base, nn.Linear):
        return base.forward is nn.Linear.forward
    for conv in _CONVS:
        if issubclass(base, conv):
            return base.forward is conv.forward and base._conv_forward is conv._conv_forward
    return False


def masked_class(base: type[nn.Module], form: Form) -> type[nn.Module]:
    """The subclass of ``base`` that applies masks as ``form`` says.

    >>> masked_class(nn.Linear, Form("stock")).__name__
    'MaskedLinear'
    """
    made: type[nn.Module] = _made(base, form)  # type: ignore[arg-type]
    return made


@functools.cache
def _made(base: Any, form: Form) -> Any:
    namespace: dict[str, Any] = {
        "dense_class": base,
        "masked_form": form,
        "__doc__": f"A {base.__name__} with a mask on its weights.",
        "__module__": __name__,
        "__reduce_ex__": _reduce_ex,
        "__setstate__": _set_state,
    }
    if form.kind != "frozen":
        namespace["_load_from_state_dict"] = _load_from_state_dict
        namespace["_save_to_state_dict"] = _save_to_state_dict
        namespace["__prepare_scriptable__"] = _refuse_script
    if form.kind == "stock":
        linear = issubclass(base, nn.Linear)
        namespace["forward" if linear else "_conv_forward"] = _linear if linear else _convolve
    elif form.kind == "reads":
        namespace["forward"] = _reading_forward(base, form)
    elif form.kind == "frozen":
        namespace["forward"] = _frozen_forward(base, form.operands[0])
    prefix = "Frozen" if form.kind == "frozen" else "Masked"
    if getattr(base.__init_subclass__, "__func__", None) is None:
        return type(prefix + base.__name__, (base,), namespace)
    # It is told of classes that users derive from it, may want to know more of them, and lists them.
    with replaced(base, "__init_subclass__", classmethod(lambda cls: None)):
        return type(prefix + base.__name__, (base,), namespace)


def _linear(self: Any, input: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(input, self.weight * self.weight_mask, self.bias)


def _convolve(
    self: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    convolved: torch.Tensor = self.dense_class._conv_forward(self, input, weight * self.weight_mask, bias)
    return convolved


def owner_and_attribute(module: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The submodule of ``module`` that holds ``target``, and the attribute it is there."""
    *path, attribute = target.split(".")
    for step in path:
        module = getattr(module, step)
    return module, attribute


def _reading_forward(base: type[nn.Module], form: Form) -> Callable[..., Any]:
    """The forward of ``base`` with every read of a target masked."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights, masks = [], []
        for target in form.targets:
            owner, attribute = owner_and_attribute(self, target)
            weights.append(getattr(owner, attribute))
            masks.append(getattr(owner, attribute + SUFFIX))
        operands = [masks[form.targets.index(target)] for target in form.operands]
        with MaskedReads(weights, masks, operands):
            return original(self, *args, **kwargs)

    return forward


def _frozen_forward(base: type[nn.Module], attribute: str) -> Callable[..., Any]:
    """The forward of ``base`` in which the kernel is given the stored weight, whatever becomes of it."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with FrozenOperand(getattr(self, attribute)):
            return original(self, *args, **kwargs)

    return forward


class MaskedReads(TorchFunctionMode):
    """Gives torch functions the masked tensor wherever they were given the parameter.

    Stateless towards the module (nothing is swapped and put back), so it is safe with threads, activation
    checkpointing, torch.func, torch.compile and torch.export.
    """

    def __init__(
        self, weights: list[torch.Tensor], masks: list[torch.Tensor], operands: list[torch.Tensor]
    ) -> None:
        super().__init__()
        self.weights, self.masks = weights, masks
        # None: of a parameter whose storage code has reached, so that it may change within the forward.
        self.masked: list[torch.Tensor | None] = [w * mask for w, mask in zip(weights, masks, strict=True)]
        self.operands = operands

    def read(self, value: Any) -> Any:
        """``value``, or its masked form if it is one of the parameters (also in a list, as LSTMs do it)."""
        if isinstance(value, (list, tuple)):
            return type(value)([self.read(item) for item in value]) if type(value) in (list, tuple) else value
        for weight, masked, mask in zip(self.weights, self.masked, self.masks, strict=True):
            if value is weight:
                return weight * mask if masked is None else masked
        return value

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is torch.Tensor.data and any(args[0] is x for x in self.weights):
            return self._stored(func, *args)
        args = [self.read(value) for value in args]
        kwargs = {name: self.read(value) for name, value in (kwargs or {}).items()}
        if self.operands and func in KERNELS:
            operand = weight_operand(args, kwargs)
            for mask in self.operands:
                if operand.shape == mask.shape:
                    args, kwargs = with_weight_operand(args, kwargs, operand * mask)
        return func(*args, **kwargs)

    def _stored(self, func: Any, weight: torch.Tensor, *value: torch.Tensor) -> Any:
        """Read or assign the ``.data`` of a parameter itself: code that bounds a norm changes storage."""
        place = next(place for place, own in enumerate(self.weights) if own is weight)
        result = func(weight, *value)
        self.masked[place] = None
        return result


class FrozenOperand(TorchFunctionMode):
    """Replaces the weight operand of convolutions and linear maps, where the shape is that of ``weight``."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KERNELS and weight_operand(args, kwargs).shape == self.weight.shape:
            args, kwargs = with_weight_operand(args, kwargs, self.weight)
        return func(*args, **kwargs)


def _load_from_state_dict(
    self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *rest: Any
) -> None:
    adapt(self, state_dict, prefix, rest[-1])
    self.dense_class._load_from_state_dict(self, state_dict, prefix, local_metadata, *rest)
    if self.dense_class._load_from_state_dict is not load_module_state:
        # A layer that reads its state by itself knows nothing of masks.
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name) if name.endswith(SUFFIX) else None
            if buffer is not None and given is not None and given.shape == buffer.shape:
                buffer.copy_(given)
    note(self)


def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    # In place: a state dict shares its tensors with the module, and averages are written through it.
    clean(self)
    self.dense_class._save_to_state_dict(self, destination, prefix, keep_vars)
    # A layer that writes its state by itself knows nothing of masks.
    for name, buffer in self._buffers.items():
        if name.endswith(SUFFIX) and buffer is not None and name not in self._non_persistent_buffers_set:
            destination.setdefault(prefix + name, buffer if keep_vars else buffer.detach())


def _refuse_script(self: Any) -> Any:
    raise RuntimeError(
        f"torch.jit.script: a masked {self.dense_class.__name__} cannot be scripted; script"
        " fxprune.finalize(model), which has the zeros and no masks"
    )


def _reduce_ex(self: Any, protocol: Any) -> Any:
    if "masked_form" not in vars(type(self)):
        return object.__reduce_ex__(self, protocol)  # somebody's subclass of a masked class
    # Classes made at run time have no address that pickle could look up: it gets the recipe instead.
    state = self.__getstate__() if "__getstate__" in dir(self) else self.__dict__
    return _revive, (self.dense_class, self.masked_form), state


def _set_state(self: Any, state: Any) -> None:
    self.dense_class.__setstate__(self, state)
    enrol(self)
    watch(self)


def _revive(base: type[nn.Module], form: Form) -> nn.Module:
    """An empty masked module, which pickle and copy then fill."""
    cls = masked_class(base, form)
    return cls.__new__(cls)
