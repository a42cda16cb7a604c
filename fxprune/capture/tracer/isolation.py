"""Restore what a trace changes: the model, everything else its code can write, and random generators."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxprune.capture.tracer.reachable import CACHED, HOOK_TABLES, Place, Reachable
from fxprune.capture.tracer.snapshots import content, difference, restore

__all__ = ["ModelState", "restore_rng", "rng_state"]


class ModelState:
    """The state of ``model`` and of all that its code can write, as it is when this object is made.

    ``places`` are where cached and scripted functions are found.
    """

    def __init__(self, model: nn.Module) -> None:
        found = Reachable(model)
        self.places: list[Place] = found.places
        self._saved = [(container, content(container.value)) for container in found.containers]
        self._caches = {id(place.function): place.function for place in found.places}
        self._misses = {key: _misses(function) for key, function in self._caches.items()}
        self._rng = torch.get_rng_state(), rng_state()

    @contextmanager
    def restored(
        self, changed: dict[str, str], allowed: Callable[[Any, Any], bool] = operator.is_
    ) -> Iterator[None]:
        """Restore the state on leaving.

        ``changed`` gets, for every module that wrote an attribute of itself, the name of it; the key ""
        stands for globals, too. ``allowed`` says of an old and a new value that this is no such change.
        """
        try:
            yield
        finally:
            self.restore(changed, allowed)

    def restore(
        self, changed: dict[str, str] | None = None, allowed: Callable[[Any, Any], bool] = operator.is_
    ) -> None:
        """Restore the state; the arguments are those of :meth:`restored`."""
        for container, old in self._saved:
            name = difference(container.value, old, allowed)
            if name is not None and changed is not None and container.owner.name not in HOOK_TABLES:
                changed.setdefault(container.owner.path or "", container.owner.name or name)
            restore(container.value, old)
        for key, function in self._caches.items():
            if _misses(function) != self._misses[key]:
                function.cache_clear()
                self._misses[key] = _misses(function)
        torch.set_rng_state(self._rng[0])
        restore_rng(self._rng[1])


def rng_state() -> tuple[Any, ...]:
    """The state of the random generators of Python and numpy: comparable, and equal while nobody draws."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, key, *rest = numpy.random.get_state()
    return random.getstate(), (kind, key.tobytes(), *rest)


def restore_rng(state: tuple[Any, ...]) -> None:
    """Undo draws: set the generators to what :func:`rng_state` returned."""
    random.setstate(state[0])
    if len(state) > 1:
        numpy = sys.modules["numpy"]
        kind, key, *rest = state[1]
        numpy.random.set_state((kind, numpy.frombuffer(key, dtype=numpy.uint32), *rest))


def _misses(function: Any) -> int:
    return int(function.cache_info().misses) if isinstance(function, CACHED) else 0
