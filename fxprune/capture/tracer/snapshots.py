"""Copy, compare and restore what a container holds.

The methods of Python's own types are called by name: those of subclasses may do something else besides.
"""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch

__all__ = ["Globals", "content", "is_same", "plain_dict", "rebound_entry", "restore"]

EMPTY = object()
IMPORTED = (ModuleType, type, FunctionType)
Allowed = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Globals:
    """The globals of a Python module."""

    names: dict[str, Any]


def plain_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    """A dict of what a dict holds, in its order."""
    if type(value) is dict:
        return value.copy()
    keys = OrderedDict.__iter__(value) if isinstance(value, OrderedDict) else dict.__iter__(value)
    return {key: dict.__getitem__(value, key) for key in keys}


@singledispatch
def content(value: Any) -> Any:
    """A copy of what a container holds; its entries are not copied. The default is a numpy generator."""
    return value.bit_generator.state if hasattr(value, "bit_generator") else value.get_state()


content.register(dict, plain_dict)
content.register(list, list.copy)
content.register(set, set.copy)
content.register(deque, list)
content.register(random.Random, random.Random.getstate)
content.register(torch.Generator, torch.Generator.get_state)


@content.register
def _(value: Globals) -> Any:
    return value.names.copy()


@content.register
def _(value: type) -> Any:
    return {name: item for name, item in vars(value).items() if not name.startswith("__")}


@content.register
def _(value: CellType) -> Any:
    try:
        return value.cell_contents
    except ValueError:
        return EMPTY


def is_same(value: Any, old: Any) -> bool:
    """Whether a container of the most frequent types is known at a glance to hold what it held.

    >>> is_same({"a": 1}, {"a": 1}), is_same({"a": 1}, {"a": 2}), is_same({1}, {1})
    (True, False, False)
    """
    kind = type(value)
    if (kind is not dict and kind is not OrderedDict) or len(value) != len(old):
        return False
    # Not ==, which tensors and the user's own classes answer as they like.
    return not old or (
        all(map(operator.is_, value.values(), old.values())) and all(map(operator.is_, value, old))
    )


@singledispatch
def restore(value: Any, old: Any) -> None:
    """Give a container the ``old`` content."""
    if hasattr(value, "bit_generator"):
        value.bit_generator.state = old
    else:
        value.set_state(old)


@restore.register
def _(value: dict, old: Any) -> None:  # type: ignore[type-arg]
    if _is_changed(plain_dict(value), old):
        kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        kind.clear(value)
        for key, item in old.items():
            kind.__setitem__(value, key, item)


@restore.register
def _(value: list, old: Any) -> None:  # type: ignore[type-arg]
    list.__setitem__(value, slice(None), old)


@restore.register
def _(value: set, old: Any) -> None:  # type: ignore[type-arg]
    if value != old:
        set.clear(value)
        set.update(value, old)


@restore.register
def _(value: deque, old: Any) -> None:  # type: ignore[type-arg]
    if rebound_entry(value, old, operator.is_) is not None:
        deque.clear(value)
        deque.extend(value, old)


@restore.register
def _(value: Globals, old: Any) -> None:
    for name in _rebound(value.names, old):
        if name in old:
            value.names[name] = old[name]
        else:
            del value.names[name]


@restore.register
def _(value: type, old: Any) -> None:
    for name in _rebound(content(value), old):
        if name in old:
            type.__setattr__(value, name, old[name])
        else:
            type.__delattr__(value, name)


@restore.register
def _(value: CellType, old: Any) -> None:
    if content(value) is old:
        return
    if old is EMPTY:
        del value.cell_contents
    else:
        value.cell_contents = old


restore.register(random.Random, random.Random.setstate)
restore.register(torch.Generator, lambda value, old: value.set_state(old))


def rebound_entry(value: Any, old: Any, allowed: Allowed) -> str | None:
    """Name an entry that was rebound, or the kind of container where entries have no name.

    ``allowed`` says of an old and a new entry that this does not count.
    """
    if isinstance(value, dict):
        return next(iter(_entries(plain_dict(value), old, allowed)), None)
    if isinstance(value, Globals | type):
        return next(iter(_rebound(content(value), old)), None)
    if isinstance(value, CellType):
        now = content(value)
        return None if now is old or allowed(old, now) else "a variable of a closure"
    if isinstance(value, list | deque):
        same = len(value) == len(old) and all(map(operator.is_, value, old))
    else:
        same = not isinstance(value, set) or value == old
    return None if same else type(value).__name__


def _entries(now: dict[Any, Any], old: dict[Any, Any], allowed: Allowed) -> list[str]:
    if not _is_changed(now, old):
        return []
    changed = [key for key in {**old, **now} if now.get(key) is not old.get(key) and key != "training"]
    return [str(key) for key in changed if not allowed(old.get(key), now.get(key))]


def _is_changed(now: dict[Any, Any], old: dict[Any, Any]) -> bool:
    same = len(now) == len(old) and all(map(operator.is_, now.values(), old.values()))
    return not same or list(now) != list(old)


def _rebound(now: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """The names in a module or a class that were rebound; new ones for what was imported do not count."""
    if not _is_changed(now, old):
        return []
    names = [name for name in {**old, **now} if now.get(name, EMPTY) is not old.get(name, EMPTY)]
    return [name for name in names if name in old or not isinstance(now[name], IMPORTED)]
