"""Follow parameters and buffers through the constants that are made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reads", "joined", "label", "lost", "overwritten"]

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
                found[name] = _together(found[name], moved) if name in found else moved
        return found

    return Reads(tuple(dict.fromkeys(name for part in parts for name in part.names)), labels)


def overwritten(
    old: Reads | None, new: Reads | None, write: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int]
) -> Reads | None:
    """Return the parameters in a constant of ``shape`` after another was written into it.

    ``write`` takes the numbers of both and gives those of the result. Where something that is no parameter
    is written, the entries that it took the place of go on telling which entries of a parameter the places
    are for: those get smaller together.
    """
    if new is None or (old is None and not new.names):
        return None if old is None else Reads(old.names, old.labels)

    @functools.cache
    def labels() -> Labels:
        found = {} if old is None else dict(old.labels())
        for name, own in new.labels().items():
            before = found.get(name, torch.zeros(tuple(shape), dtype=torch.int64))
            if own is None or before is None:
                found[name] = None
            else:
                found[name] = _attempt(functools.partial(_in_place, write, before), 0, own)
        return found

    return Reads(tuple(dict.fromkeys((*(() if old is None else old.names), *new.names))), labels)


def _in_place(write: Callable[[Tensor, Tensor], Tensor], before: Tensor, place: int, own: Tensor) -> Tensor:
    return write(before, own)


def _together(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The labels of a parameter that is in two operands; None where its entries meet each other."""
    if one is None or other is None or one.shape != other.shape or bool(((one > 0) & (other > 0)).any()):
        return None
    return one + other


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
