"""The model as it was: what a trace changes is put back, and told.

In: a model. Out: a context after which its attributes, flags, buffers and the random number generators
are what they were before, and the names of the modules whose ``forward`` had changed something.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module, changed: dict[str, str]) -> Iterator[None]:
    """Undo what happens to ``model`` inside; ``changed`` gets what each changed module wrote."""
    saved = [
        (path, vars(module), dict(vars(module)), _copies(vars(module)))
        for path, module in model.named_modules()
    ]
    state, numbers = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        for path, attributes, before, copies in saved:
            name = _restore(attributes, before, copies)
            if name is not None:
                changed.setdefault(path, name)
        torch.set_rng_state(state)
        random.setstate(numbers)


def _copies(attributes: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    kinds = (list, dict, set)
    return [(key, value, value.copy()) for key, value in attributes.items() if isinstance(value, kinds)]


def _restore(
    attributes: dict[str, Any], before: dict[str, Any], copies: list[tuple[str, Any, Any]]
) -> str | None:
    found = None
    if len(attributes) != len(before) or any(attributes[key] is not value for key, value in before.items()):
        differing = [key for key in {**attributes, **before} if attributes.get(key) is not before.get(key)]
        found = next((key for key in differing if key != "training"), None)
        attributes.clear()
        attributes.update(before)
    for key, container, copy in copies:
        if _same(container, copy):
            continue
        found = found or key
        container.clear()
        if isinstance(container, list):
            container.extend(copy)
        else:
            container.update(copy)
    return found


def _same(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in copy.items())
    if isinstance(container, list):
        return all(a is b for a, b in zip(container, copy, strict=True))
    return bool(container == copy)
