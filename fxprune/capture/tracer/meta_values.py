"""Shapes instead of numbers: runs a PyTorch function on the meta device.

In: a function call with any mix of real and meta tensors. Out: its result on the meta device. Real
tensors are read for their shape only; nothing is allocated, and nothing is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fxprune.capture.errors import CaptureError
from fxprune.capture.tracer.spelling import CONSTRUCTORS, RANDOM
from fxprune.capture.tracer.traced_numbers import plain_number

__all__ = ["META", "Shadows", "like_dict", "map_structure"]

META = torch.device("meta")
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Underscores at the end of these names do not mean that they write.
PURE_DUNDERS = frozenset(
    (
        "__and__", "__eq__", "__floordiv__", "__ge__", "__getitem__", "__gt__", "__invert__", "__le__",
        "__lshift__", "__lt__", "__ne__", "__or__", "__pow__", "__rdiv__", "__rfloordiv__", "__rpow__",
        "__rshift__", "__rsub__", "__xor__",
    )
)  # fmt: skip
# Their results are not determined by their arguments.
UNSETTLED = RANDOM | {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
NORMS = frozenset((torch.batch_norm, F.batch_norm))
ACTIVATIONS = frozenset((
    F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.selu,
    F.celu, F.mish, F.softplus, F.sigmoid, F.tanh, F.logsigmoid, torch.relu, torch.sigmoid, torch.tanh,
    Tensor.relu, Tensor.sigmoid, Tensor.tanh,
))  # fmt: skip
WHOLE = frozenset((torch.int64, torch.int32, torch.int16, torch.int8))
FILLS = frozenset(("fill", "full", "full_like", "new_full"))
MOVERS = frozenset(("cpu", "cuda", "xpu", "ipu", "hpu", "mtia", "pin_memory"))


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to whatever is not a tuple, list, dict or slice in it."""
    if isinstance(value, torch.Size):
        return tuple(function(item) for item in value)
    if isinstance(value, tuple):
        items = [map_structure(function, item) for item in value]
        kind: Any = type(value)
        if hasattr(value, "_fields"):
            return kind._make(items)  # without what the constructor checks
        return tuple(items) if type(value) is tuple else type(value)(items)
    if isinstance(value, list):
        return [map_structure(function, item) for item in value]
    if isinstance(value, dict):
        return like_dict(value, {key: map_structure(function, item) for key, item in value.items()})
    if isinstance(value, slice):
        return slice(*(map_structure(function, item) for item in (value.start, value.stop, value.step)))
    return function(value)


def like_dict(value: Mapping[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """``items`` in a dict of the class of ``value``, which may be a dataclass, as a ``ModelOutput``.

    Example:
        >>> from collections import Counter
        >>> like_dict(Counter(a=1), {"a": 2})
        Counter({'a': 2})
    """
    if type(value) is dict or type(value).__module__.startswith("torch.fx."):
        return items
    # Not its constructor: that may look at the items, which may be nodes of a graph.
    made: dict[Any, Any] = copy.copy(cast(dict[Any, Any], value))
    for key, item in items.items():
        made[key] = item
    return made


class Shadows:
    """Meta twins of real tensors; those of ``model`` with other ``dtypes`` if told so.

    ``known`` keeps the shapes of results: networks repeat themselves, and so do traces.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        dtypes: Mapping[Any, torch.dtype] | None = None,
        known: dict[Any, Any] | None = None,
    ) -> None:
        self._known = {} if known is None else known
        self.numbers: Callable[[Tensor], Tensor] = self.value
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in (*model.parameters(), *model.buffers()) if model is not None else ():
            self._twins[id(tensor)] = tensor, meta_like(tensor, dtypes)
        self._state = set(self._twins)
        self._recipes: dict[int, tuple[_Computation, int | None, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The meta tensor of the same shape, strides and type; a meta tensor stands for itself."""
        found = self._twins.get(id(tensor))
        if found is None and tensor.is_meta and type(tensor) is Tensor:
            return tensor
        if found is None:
            found = tensor, meta_like(tensor)
            self._twins[id(tensor)] = found
        return found[1]

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``function(*args, **kwargs)``, in shapes.

        Example:
            >>> Shadows().run(torch.mm, (torch.ones(2, 3), torch.ones(3, 4)), {}).shape
            torch.Size([2, 4])
        """
        operands: list[Tensor] = []

        def argument(value: Any) -> Any:
            if isinstance(value, Tensor):
                operands.append(value)
                return self.of(value)
            return META if isinstance(value, torch.device) else plain_number(value)

        given, options = args, kwargs
        args = tuple([map_structure(argument, arg) for arg in args])
        kwargs = {key: map_structure(argument, arg) for key, arg in kwargs.items()}
        name = getattr(function, "__name__", "")
        if kwargs.get("device") is not None or function in CONSTRUCTORS:
            kwargs["device"] = META
        elif name in MOVERS and args:
            return args[0].detach()
        elif name == "to" and isinstance(args[1] if len(args) > 1 else None, str):
            args = (args[0], META, *args[2:])
        if name.endswith("_") and name not in PURE_DUNDERS:
            for tensor in operands[:1]:
                self._recipes.pop(id(tensor), None)
            return self._computed(function, args, kwargs)
        key = _frozen((function, args, kwargs))
        if key in self._known:
            result = map_structure(_made, self._known[key])
        else:
            result = _recurrent(name, args)
            result = _unchanged_shape(function, args, kwargs) if result is None else result
            by_numbers = False
            if result is None:
                result, by_numbers = self._shapes_of(function, (args, kwargs), (given, options))
            if key is not None and not by_numbers and _storable(result):
                self._known[key] = map_structure(_Spec.of, result)
        if (operands or function in CONSTRUCTORS) and name not in UNSETTLED:
            if all(id(tensor) in self._recipes or self._fixed(tensor) for tensor in operands):
                self._remember(result, _Computation(function, given, options), operands)
        return result

    def value(self, tensor: Tensor, name: str = "item") -> Tensor:
        """The numbers in a tensor that depends on neither inputs nor parameters.

        Raises:
            CaptureError: it does.
        """
        if self._fixed(tensor):
            return tensor
        found = self._recipes.get(id(tensor))
        if found is None:
            raise CaptureError(f"{name.strip('_')}() asks for the numbers in a tensor")

        def argument(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self.value(item)
            return torch.device("cpu") if isinstance(item, torch.device) else plain_number(item)

        recipe, index, _ = found
        args = [map_structure(argument, arg) for arg in recipe.args]
        kwargs = {key: map_structure(argument, arg) for key, arg in recipe.kwargs.items()}
        with torch.no_grad():
            result: Any = recipe.function(*args, **kwargs)
        numbers: Tensor = result if index is None else result[index]
        return numbers

    def written(self, before: Any, after: Any) -> bool:
        """Whether ``after`` is ``before`` with an in-place operation done to it."""
        found = self._twins.get(id(before))
        return found is not None and found[1] is after

    def _fixed(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and id(tensor) not in self._state

    def _remember(self, result: Any, recipe: _Computation, operands: list[Tensor]) -> None:
        """Note how results are computed; one that is an operand itself is what it was before."""
        known = {id(tensor) for tensor in operands}
        parts: Any = enumerate(result) if isinstance(result, tuple | list) else [(None, result)]
        for index, x in parts:
            if isinstance(x, Tensor) and id(x) not in known:
                self._recipes[id(x)] = recipe, index, x

    def _shapes_of(self, function: Callable[..., Any], shapes: Any, given: Any) -> tuple[Any, bool]:
        """The result in shapes, and whether PyTorch asked for numbers among the arguments (a fill, a slice).

        ``given`` are the arguments that have these ``shapes``.
        """
        try:
            return self._computed(function, *shapes), False
        except RuntimeError as error:
            if "cannot be called on meta tensors" not in str(error):
                raise
            fills = getattr(function, "__name__", "") in FILLS

        def number(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return META if isinstance(item, torch.device) else plain_number(item)
            if item.dim():
                return self.of(item)
            return torch.ones((), dtype=item.dtype) if fills else self.numbers(item)

        given = _with_any_index(function, *given)
        args, kwargs = (map_structure(number, part) for part in given)
        if kwargs.get("device") is not None or function in CONSTRUCTORS:
            kwargs["device"] = META
        return self._computed(function, args, kwargs), True

    def _computed(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            try:
                return function(*args, **kwargs)
            except RuntimeError:
                # A function that makes tensors inside makes them on the default device: try with meta as
                # that.
                with META:
                    return function(*args, **kwargs)


def _with_any_index(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Replace single numbers that pick an entry, which decide no shape, by zeros; those of slices stay."""
    if getattr(function, "__name__", "") != "__getitem__" or len(args) != 2:
        return args, kwargs

    def picked(part: Any) -> Any:
        is_number = isinstance(part, Tensor) and not part.dim() and part.dtype in WHOLE
        return torch.zeros((), dtype=part.dtype) if is_number else part

    index = args[1]
    return (args[0], tuple(map(picked, index)) if type(index) is tuple else picked(index)), kwargs


def _recurrent(name: str, args: tuple[Any, ...]) -> Any:
    """Shapes of a recurrent layer's results: worked out by PyTorch they would cost one pass per time step."""
    if name not in ("lstm", "gru", "rnn_tanh", "rnn_relu") or len(args) != 9 or not isinstance(args[2], list):
        return None
    data, state = args[0], args[1][0] if name == "lstm" else args[1]
    out = data.new_empty(*data.shape[:-1], state.shape[-1] * (2 if args[7] else 1))
    return (out, *(torch.empty_like(x) for x in (args[1] if name == "lstm" else (state,))))


def _unchanged_shape(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The result of what keeps the shape of its input, which PyTorch works out in many small steps."""
    x, norm = args[0] if args else None, function in NORMS
    if not (norm or function in ACTIVATIONS) or not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    others = [*args[1:], *kwargs.values()]
    if not norm:
        writes = any(other is True for other in others)  # in place
        return None if writes or any(isinstance(other, Tensor) for other in others) else _empty_like(x)
    sizes = {other.shape for other in others if isinstance(other, Tensor)}
    fits = x.dim() > 1 and x.numel() > x.shape[1] and sizes <= {x.shape[1:2]}  # else it may raise
    return _empty_like(x) if fits else None


def _empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, which on the meta device is written in Python and ten times slower."""
    return torch.empty(x.shape, dtype=x.dtype, device=META) if x.is_contiguous() else torch.empty_like(x)


@dataclass(frozen=True)
class _Computation:
    """Record how a constant tensor was made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Spec:
    """All that a meta tensor is."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Spec:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)


def _made(spec: _Spec) -> Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=META)


def _storable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_storable(item) for item in value)
    return type(value) is Tensor and value.layout is torch.strided


def _frozen(value: Any) -> Any:
    """A hashable stand-in for the arguments of a call, or None if there is none."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.layout is torch.strided else None
    if isinstance(value, tuple | list):
        items = tuple([_frozen(item) for item in value])
        return None if None in items else (type(value), items)
    if isinstance(value, dict):
        items = tuple([_frozen(item) for item in value.values()])
        return None if None in items else (tuple(value), items)
    if isinstance(value, slice):
        return _frozen((value.start, value.stop, value.step))
    # 1, 1.0 and True are equal, but do not give equal results.
    return (type(value), value) if isinstance(value, Hashable) else None


def meta_like(tensor: Tensor, dtypes: Mapping[Any, torch.dtype] | None = None) -> Tensor:
    """A meta tensor with the metadata of ``tensor``; packed or sparse ones count as dense."""
    dtype = (dtypes or {}).get(tensor.dtype, tensor.dtype)
    if tensor.is_nested:
        raise CaptureError("a nested tensor has rows of several lengths, which no shape says")
    with torch.no_grad():
        if tensor.layout is not torch.strided or type(tensor) not in PLAIN:
            return torch.empty(tensor.shape, dtype=dtype, device=META)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=META)
