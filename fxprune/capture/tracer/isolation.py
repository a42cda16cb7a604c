"""The model as it was: what a trace changes is put back, and told.

In: a model. Out: a context after which its attributes, flags, buffers and the random number generators
are what they were before, and the names of the modules whose ``forward`` had changed something.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["dice", "throw_back", "untouched"]

# Hooks that the model hangs up while it runs are called while it is traced.
HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(
    model: nn.Module, changed: dict[str, str], allowed: Callable[[Any, Any], bool] = operator.is_
) -> Iterator[None]:
    """Undo what happens to ``model`` inside.

    ``changed`` gets, for every module that wrote an attribute of itself, the name of it. ``allowed`` says
    of an old and a new value that this is no such change.
    """
    saved = [(path, _copies(vars(module))) for path, module in model.named_modules()]
    state, others = torch.get_rng_state(), dice()
    try:
        yield
    finally:
        for path, copies in saved:
            for owner, container, copy in copies:
                name = _difference(container, copy, allowed)
                if name is not None and owner not in HOOK_TABLES:
                    changed.setdefault(path, owner or name)
                _restore(container, copy)
        torch.set_rng_state(state)
        throw_back(others)


def dice() -> tuple[Any, ...]:
    """The state of the random generators of Python and numpy: comparable, and equal while nobody draws."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, key, *rest = numpy.random.get_state()
    return random.getstate(), (kind, key.tobytes(), *rest)


def throw_back(state: tuple[Any, ...]) -> None:
    """Undo draws: back to what :func:`dice` gave."""
    random.setstate(state[0])
    if len(state) > 1:
        numpy = sys.modules["numpy"]
        kind, key, *rest = state[1]
        numpy.random.set_state((kind, numpy.frombuffer(key, dtype=numpy.uint32), *rest))


def _copies(attributes: dict[str, Any]) -> list[tuple[str | None, Any, Any]]:
    """The attributes and the containers among them, with copies. The attributes are put back first.

    A container goes by its own name, the tables of torch (``_buffers``) by that of the entry that changed.
    """
    found: list[tuple[str | None, Any, Any]] = [(None, attributes, attributes.copy())]
    for name, value in attributes.items():
        if isinstance(value, list | dict | set):
            found.append((None if name in TABLES else name, value, value.copy()))
    return found


def _difference(container: Any, copy: Any, allowed: Callable[[Any, Any], bool]) -> str | None:
    if isinstance(container, dict):
        for key in {**copy, **container}:
            before, after = copy.get(key), container.get(key)
            if before is not after and key != "training" and not allowed(before, after):
                return str(key)
        return None
    if isinstance(container, list):
        same = len(container) == len(copy) and all(map(operator.is_, container, copy))
    else:
        same = container == copy
    return None if same else type(container).__name__


def _restore(container: Any, copy: Any) -> None:
    if isinstance(container, dict):
        if len(container) == len(copy) and all(map(operator.is_, container.values(), copy.values())):
            return
        container.clear()
        container.update(copy)
    elif isinstance(container, list):
        container[:] = copy
    elif container != copy:
        container.clear()
        container.update(copy)
