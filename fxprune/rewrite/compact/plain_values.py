"""Write the arguments of graph nodes as JSON, and read them back; nothing but data is ever read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["FUNCTIONS", "METHODS", "Unwritable", "decode", "decode_tree", "encode", "encode_tree"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch.split": torch.split,
    "operator.getitem": operator.getitem,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.add": operator.add,
    "torch.clamp": torch.clamp,
    "torch.sqrt": torch.sqrt,
    "torch.var_mean": torch.var_mean,
}
METHODS = {"index_select", "new_tensor", "split"}
"""The functions and methods that a rewritten node may call; a file can name no others."""

_NAMED = (torch.dtype, torch.layout, torch.memory_format)


class Unwritable(Exception):
    """Raised where something has no form as data."""


def encode(value: Any, *, strict: bool = True) -> Any:
    """Return a value as JSON; with ``strict=False`` what has no such form becomes the name of its type.

    >>> encode((1, slice(None, 2), torch.float32))
    {'tuple': [1, {'slice': [None, 2, None]}, {'torch': 'float32'}]}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(item, strict=strict) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, strict=strict) for item in value]}
    if isinstance(value, dict):
        pairs = [[encode(k, strict=strict), encode(v, strict=strict)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, slice):
        return {"slice": [encode(x, strict=strict) for x in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, _NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if strict:
        raise Unwritable(f"a {type(value).__name__} as an argument")
    return {"type": type(value).__qualname__}


def decode(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """Undo :func:`encode`; ``nodes`` are those that may be referred to, by name.

    >>> decode(encode([1.5, 2j, (None, ...)]))
    [1.5, 2j, (None, Ellipsis)]
    """
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), *more = value.items()
    if more:
        raise ValueError(f"unknown value {value!r}")
    if kind == "node" and nodes is not None:
        return nodes[inner]
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in inner)
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in inner}
    if kind == "slice":
        return slice(*(decode(item, nodes) for item in inner))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "complex":
        return complex(*inner)
    if kind == "torch" and isinstance(getattr(torch, inner, None), _NAMED):
        return getattr(torch, inner)
    if kind == "device":
        return torch.device(inner)
    raise ValueError(f"unknown value {value!r}")


def encode_tree(value: Any) -> Any:
    """Return nested tuples, lists and dicts of tensors and constants as JSON; tensors by shape and type.

    >>> encode_tree(torch.ones(2, 3))
    {'tensor': [2, 3], 'dtype': 'float32'}
    """
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [encode_tree(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode_tree(item)] for key, item in value.items()]}
    return encode(value)


def decode_tree(value: Any) -> Any:
    """Undo :func:`encode_tree`; tensors stand on the meta device."""
    if isinstance(value, dict) and "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        return torch.empty(value["tensor"], dtype=dtype, device="meta")
    if isinstance(value, dict) and value.keys() in ({"list"}, {"tuple"}):
        kind = tuple if "tuple" in value else list
        return kind(decode_tree(item) for item in next(iter(value.values())))
    if isinstance(value, dict) and value.keys() == {"dict"}:
        return {decode(key): decode_tree(item) for key, item in value["dict"]}
    return decode(value)
