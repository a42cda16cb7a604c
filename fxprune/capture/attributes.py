"""Keep the attributes that modules had when they were captured.

The inside of a leaf is traced when the graph is lowered. A cache that was filled since then must not change
what is found there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Attributes", "attributes_of", "restored_attributes"]

OTHERS = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Attributes:
    """The attributes of one module of class ``kind``: all of their ``names``, and the ``values`` of those
    that are no tensors."""

    kind: type[nn.Module]
    names: frozenset[str]
    values: dict[str, Any]


def attributes_of(module: nn.Module) -> dict[str, Attributes]:
    """Copy the attributes of a module and of those in it, by path; the classes of PyTorch keep no caches."""
    found = {}
    for path, inner in module.named_modules():
        if not type(inner).__module__.startswith(("torch.", "fxprune.")):
            own = {name: value for name, value in vars(inner).items() if name not in OTHERS}
            values = {name: _copied(value) for name, value in own.items() if not isinstance(value, Tensor)}
            found[path] = Attributes(type(inner), frozenset(own), values)
    return found


@contextmanager
def restored_attributes(module: nn.Module, known: Mapping[str, Attributes]) -> Iterator[None]:
    """Give a module and those in it their ``known`` attributes inside, and afterwards what they had.

    A module that has another class than it had is no longer the one that was captured, and stays as it is.
    """
    pairs = [(known[path], inner) for path, inner in module.named_modules() if path in known]
    changed = [(old, vars(inner)) for old, inner in pairs if type(inner) is old.kind]
    saved = [dict(attributes) for _, attributes in changed]
    try:
        for old, attributes in changed:
            for name in attributes.keys() - old.names - OTHERS:
                del attributes[name]
            attributes.update({name: _copied(value) for name, value in old.values.items()})
        yield
    finally:
        for (_, attributes), before in zip(changed, saved, strict=True):
            attributes.clear()
            attributes.update(before)


def _copied(value: Any) -> Any:
    """A copy of a collection and of those in it; what is no collection is taken as it is."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_copied(item) for item in value])
    return set(value) if type(value) is set else value
