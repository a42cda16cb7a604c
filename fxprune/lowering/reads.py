"""Follow parameters and buffers through the constants that are made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reads", "joined", "label", "lost"]

Labels = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Reads:
    """The parameters and buffers in a constant.

    ``labels`` gives by name a tensor of the constant's shape: one more than the flat index of the parameter's
    entry that is there, 0 for none; ``None`` where no entry of the parameter can be told apart. ``whole``:
    the constant is the parameter itself.
    """

    names: tuple[str, ...]
    labels: Callable[[], Labels]
    whole: bool = False

    @classmethod
    def of(cls, name: str, shape: Sequence[int]) -> Reads:
        """The parameter ``name`` itself."""
        return cls((name,), functools.cache(lambda: {name: label(shape)}), whole=True)


def label(shape: Sequence[int]) -> Tensor:
    """The labels of a parameter itself."""
    shape = tuple(shape)
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)


def joined(parts: Sequence[Reads], change: Callable[[int, Tensor], Tensor]) -> Reads:
    """The parameters of several operands, in a constant made of them.

    Args:
        parts: one per operand that has any.
        change: takes the place of the operand in ``parts`` and its labels, and gives those of the result.
    """

    @functools.cache
    def labels() -> Labels:
        found: dict[str, Tensor | None] = {}
        for place, part in enumerate(parts):
            for name, own in part.labels().items():
                moved = None if own is None else _attempt(change, place, own)
                found[name] = None if name in found else moved  # one that is there twice
        return found

    return Reads(tuple(dict.fromkeys(name for part in parts for name in part.names)), labels)


def _attempt(change: Callable[[int, Tensor], Any], place: int, own: Tensor) -> Tensor | None:
    try:
        result = change(place, own)
    except (RuntimeError, IndexError, TypeError, ValueError):  # an op that takes no integers
        return None
    is_told = isinstance(result, Tensor) and result.device.type == "cpu" and not result.is_floating_point()
    return result if is_told else None


def lost(parts: Sequence[Reads]) -> Reads:
    """The parameters of several operands, whose entries an operation has mixed."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    return Reads(names, lambda: dict.fromkeys(names))
