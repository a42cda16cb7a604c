"""Restore what a trace changes: the model, everything else its code can write, and random generators."""

from __future__ import annotations

import operator
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxprune.capture.hooks import FORWARD_TABLES
from fxprune.capture.tracer.reachable import CACHED, Place, Reachable, is_generator
from fxprune.capture.tracer.snapshots import content, is_same, rebound_entry, restore
from fxprune.capture.tracer.whole_numbers import Namespaces

__all__ = ["Changes", "ModelState", "restore_rng", "rng_state", "seed_rng"]


@dataclass
class Changes:
    """Hold what a trace has written, by the path of a module.

    ``attributes``: an attribute of the module; "" stands for globals, too. ``hooks``: a hook of the module
    that wrote something which only hooks reach.
    """

    attributes: dict[str, str] = field(default_factory=dict)
    hooks: dict[str, str] = field(default_factory=dict)


class ModelState:
    """The state of ``model`` and of all that its code can write, as it is when this object is made.

    ``places`` are where cached and scripted functions are found, ``generators`` the random generators, apart
    from PyTorch's, that the code has of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        found = Reachable(model)
        self.places: list[Place] = found.places
        self.namespaces = Namespaces()
        self._saved = [(container, content(container.value)) for container in found.containers]
        reached = (container.value for container in found.containers)
        self.generators = tuple(value for value in reached if is_generator(type(value)))
        self._caches = {id(place.function): place.function for place in found.places}
        self._misses = {key: _misses(function) for key, function in self._caches.items()}
        self._rng = torch.get_rng_state(), rng_state()
        # Those of switches that an earlier capture made are in no container.
        self._modes = [(module, module.training) for module in model.modules()]

    @contextmanager
    def restored(
        self, changes: Changes, allowed: Callable[[Any, Any], bool] = operator.is_
    ) -> Iterator[None]:
        """Restore the state on leaving.

        ``changes`` gets what was written; ``allowed`` says of an old and a new value that this is no change.
        """
        try:
            yield
        finally:
            self.restore(changes, allowed)

    def restore(
        self, changes: Changes | None = None, allowed: Callable[[Any, Any], bool] = operator.is_
    ) -> None:
        """Restore the state; the arguments are those of :meth:`restored`."""
        for container, old in self._saved:
            if is_same(container.value, old):
                continue
            owner, name = container.owner, rebound_entry(container.value, old, allowed)
            if name is not None and changes is not None and (owner.hook or owner.name not in FORWARD_TABLES):
                found = changes.hooks if owner.hook else changes.attributes
                found.setdefault(owner.path or "", owner.hook or owner.name or name)
            restore(container.value, old)
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        for key, function in self._caches.items():
            if _misses(function) != self._misses[key]:
                function.cache_clear()
                self._misses[key] = _misses(function)
        torch.set_rng_state(self._rng[0])
        restore_rng(self._rng[1])


def rng_state(own: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The state of the random generators of Python and numpy, and of ``own`` ones.

    It is comparable, and equal while nobody draws.
    """
    numpy = sys.modules.get("numpy")
    held = tuple(pickle.dumps(content(generator)) for generator in own)
    if numpy is None:
        return random.getstate(), None, held
    kind, key, *rest = numpy.random.get_state()
    return random.getstate(), (kind, key.tobytes(), *rest), held


def restore_rng(state: tuple[Any, ...], own: Sequence[Any] = ()) -> None:
    """Undo draws: set the generators to what :func:`rng_state` returned."""
    random.setstate(state[0])
    if state[1] is not None:
        numpy = sys.modules["numpy"]
        kind, key, *rest = state[1]
        numpy.random.set_state((kind, numpy.frombuffer(key, dtype=numpy.uint32), *rest))
    for generator, held in zip(own, state[2], strict=False):
        restore(generator, pickle.loads(held))


def seed_rng(seed: int) -> None:
    """Seed the generators of :func:`rng_state`."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _misses(function: Any) -> int:
    return int(function.cache_info().misses) if isinstance(function, CACHED) else 0
