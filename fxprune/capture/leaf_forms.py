"""Tell leaves apart by all that their insides depend on, so that equal ones are traced once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.capture.hooks import FORWARD_TABLES

__all__ = ["leaf_form"]

LITERALS = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format,
)  # fmt: skip
OBJECTS = (type, FunctionType, BuiltinFunctionType)
"""Objects that are told apart by their identity; what their code reads besides is the same for all leaves."""


class _NoForm(Exception):
    """An attribute may hold anything."""


def leaf_form(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """Return a key that is equal for modules whose traces on these arguments are equal, or None for no key.

    Two modules have equal keys where classes, attributes and submodules are equal, parameters and buffers
    have the same shapes and types, and are tied in the same way. Numbers in them do not count, for a trace
    cannot read them, but for whole numbers in buffers that are no state, which it can. None for modules with
    hooks, with tensors that are neither parameters nor buffers, and with attributes that are neither
    literals, functions, classes nor collections of those.

    >>> layers = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8, bias=False)
    >>> one, two, other = (leaf_form(layer, (torch.ones(2, 4),), {}) for layer in layers)
    >>> one == two, one == other
    (True, False)
    """
    tensors: dict[int, int] = {}

    def tensor(value: Tensor) -> Hashable:
        if value.layout is not torch.strided:
            raise _NoForm
        number = tensors.setdefault(id(value), len(tensors))
        facts = (tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
        return (number, type(value), *facts)

    modules = {id(inner): number for number, inner in enumerate(module.modules())}
    try:
        inside = tuple(_module(inner, modules, tensor) for inner in module.modules())
        given = _literal((tuple(args), dict(kwargs)), tensor)
    except _NoForm:
        return None
    return inside, given


def _module(inner: nn.Module, modules: Mapping[int, int], tensor: Callable[[Tensor], Hashable]) -> Hashable:
    found: list[Any] = [type(inner), _readable(inner)]
    for name, value in vars(inner).items():
        if name in FORWARD_TABLES and value:
            raise _NoForm
        if name in ("_parameters", "_buffers"):
            kept: Hashable = tuple((key, None if x is None else tensor(x)) for key, x in value.items())
        elif name == "_modules":
            kept = tuple((key, None if x is None else modules[id(x)]) for key, x in value.items())
        elif name == "training":
            continue
        else:
            kept = _literal(value, None)
        found.append((name, kept))
    return tuple(found)


def _readable(inner: nn.Module) -> Hashable:
    """The numbers in buffers that code under a trace may look at: integers that are no state."""
    buffers = [(name, inner._buffers.get(name)) for name in sorted(inner._non_persistent_buffers_set)]
    return tuple(
        (name, buffer.cpu().numpy().tobytes())
        for name, buffer in buffers
        if buffer is not None and not (buffer.is_meta or buffer.is_floating_point() or buffer.is_complex())
    )


def _literal(value: Any, tensor: Callable[[Tensor], Hashable] | None) -> Hashable:
    """A hashable stand-in; tensors have one where ``tensor`` makes it."""
    kind = type(value)
    if kind in LITERALS:
        return kind, repr(value) if kind is float else value
    if isinstance(value, OBJECTS):
        return kind, id(value)
    if kind in (tuple, list):
        return kind, tuple(_literal(item, tensor) for item in value)
    if issubclass(kind, dict) and kind.__module__ in ("builtins", "collections"):
        items = tuple((_literal(key, None), _literal(item, tensor)) for key, item in value.items())
        return kind, items
    if kind in (set, frozenset):
        return kind, frozenset(_literal(item, None) for item in value)
    if isinstance(value, Tensor) and tensor is not None:
        return tensor(value)
    raise _NoForm
