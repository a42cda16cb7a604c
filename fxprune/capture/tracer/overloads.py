"""Write calls of operators, as PyTorch's dispatcher sees them, as calls of public functions.

An overload (``aten.linear.default``) and its arguments come in. A function or method of PyTorch goes out with
its arguments: the rules of lowering, the masks and whoever reads the graph know it by that name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxprune.torch_private import OpOverload, nn_functions

__all__ = ["first_result", "public_call"]

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

RENAMED = {"self": "input", "train": "training"}
"""Parameters of operators that functions of torch.nn.functional call otherwise."""
SWITCHES = frozenset(("cudnn_enable", "cudnn_enabled"))
"""Parameters that say how, not what."""
SAME = {
    "_unsafe_view": "reshape",
    "lift_fresh_copy": "clone",
    "_conj": "conj",
    "_reshape_alias": "reshape",
}
"""Operators that have another name for callers, and the same first arguments."""
FAMILIES = {"linalg_": torch.linalg, "special_": torch.special, "fft_": torch.fft}
LAST_HOMES: tuple[Any, ...] = (Tensor, torch, nn_functions)


def public_call(overload: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The public function that does what an operator does; the operator itself if there is none.

    Example:
        >>> x = torch.ones(2, 3)
        >>> public_call(torch.ops.aten.leaky_relu.default, (x, 0.1), {})[0] is F.leaky_relu
        True
        >>> public_call(torch.ops.aten.add.Tensor, (x, x), {})[0] is Tensor.add
        True
    """
    if not isinstance(overload, OpOverload) or overload.namespace != "aten":
        return overload, args, dict(kwargs)
    given = _by_name(overload, args, kwargs)
    name = str(overload.overloadpacket.__name__)
    if name in SPELLED:
        return SPELLED[name](given)
    if name in SAME:
        return getattr(Tensor if hasattr(Tensor, SAME[name]) else torch, SAME[name]), args[:2], {}
    function = getattr(F, name, None)
    if function is not None:
        if inspect.isbuiltin(function):
            return function, args, dict(kwargs)
        taken = _parameters(function)
        named = {RENAMED.get(key, key): value for key, value in given.items()}
        if named.keys() <= taken:
            return function, (named.pop("input"),) if "input" in named else (), named
    for prefix, home in FAMILIES.items():
        if name.startswith(prefix) and hasattr(home, name.removeprefix(prefix)):
            return getattr(home, name.removeprefix(prefix)), args, dict(kwargs)
    first = next(iter(overload._schema.arguments), None)
    for home in LAST_HOMES:
        if hasattr(home, name) and (home is not Tensor or (first is not None and first.name == "self")):
            return getattr(home, name), args, dict(kwargs)
    return overload, args, dict(kwargs)


def _by_name(overload: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the schema, without those that say nothing new."""
    schema = {argument.name: argument for argument in overload._schema.arguments}
    given = {**dict(zip(schema, args, strict=False)), **kwargs}

    def is_default(name: str, value: Any) -> bool:
        known = schema[name]
        return not isinstance(value, Tensor) and known.has_default_value() and known.default_value == value

    return {
        name: value for name, value in given.items() if name not in SWITCHES and not is_default(name, value)
    }


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the parameters of a function of Python, if it takes no others."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return frozenset()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in found):
        return frozenset()
    return frozenset(parameter.name for parameter in found)


def first_result(overload: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The public function of a normalisation that gives the first of an operator's results.

    Example:
        >>> x = torch.ones(2, 3)
        >>> call = first_result(torch.ops.aten.native_layer_norm.default, (x, [3], None, None, 1e-5), {})
        >>> call[0] is F.layer_norm
        True
    """
    if not isinstance(overload, OpOverload) or str(overload) not in NORMS:
        return None
    function, names = NORMS[str(overload)]
    given = _by_name(overload, args, kwargs)
    named = {new: given[old] for old, new in names.items() if given.get(old) is not None}
    if function is F.group_norm:
        return function, (given["input"], given["group"]), named
    return function, (given["input"],), named


AFFINE = {"weight": "weight", "bias": "bias", "eps": "eps"}
STATISTICS = {**AFFINE, "running_mean": "running_mean", "running_var": "running_var"}
NORMS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "aten.native_layer_norm.default": (F.layer_norm, {**AFFINE, "normalized_shape": "normalized_shape"}),
    "aten.native_group_norm.default": (F.group_norm, AFFINE),
    "aten._native_batch_norm_legit_no_training.default": (F.batch_norm, STATISTICS),
}


# -- operators that only the dispatcher knows ----------------------------------------------------------------
def _convolution(given: dict[str, Any]) -> Call:
    kind = "conv_transpose" if given["transposed"] else "conv"
    function = getattr(F, f"{kind}{given['weight'].dim() - 2}d")
    names = ["weight", "bias", "stride", "padding", "dilation", "groups"]
    names += ["output_padding"] if given["transposed"] else []
    return function, (given["input"],), {name: given[name] for name in names if name in given}


def _softmax(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Call]:
    return lambda given: (function, (given["self"], given["dim"]), {})


def _copy(given: dict[str, Any]) -> Call:
    names = ("dtype", "device", "memory_format")
    options = {name: given[name] for name in names if given.get(name) is not None}
    if not options:
        return Tensor.clone, (given["self"],), {}
    return Tensor.to, (given["self"],), {**options, "copy": True}


def _index(given: dict[str, Any]) -> Call:
    places = tuple(slice(None) if item is None else item for item in given["indices"])
    return Tensor.__getitem__, (given["self"], places[0] if len(places) == 1 else places), {}


def _slice(given: dict[str, Any]) -> Call:
    end = given.get("end")
    end = None if isinstance(end, int) and end >= 2**62 else end
    place = slice(given.get("start"), end, given.get("step"))
    return Tensor.__getitem__, (given["self"], (*[slice(None)] * given.get("dim", 0), place)), {}


def _alias(given: dict[str, Any]) -> Call:
    return Tensor.view_as, (given["self"], given["self"]), {}


SPELLED: dict[str, Callable[[dict[str, Any]], Call]] = {
    "convolution": _convolution,
    "_softmax": _softmax(torch.softmax),
    "_log_softmax": _softmax(torch.log_softmax),
    "_to_copy": _copy,
    "alias": _alias,
    "lift_fresh": _alias,
    "index": _index,
    "slice": _slice,
}
