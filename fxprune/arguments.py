"""Check arguments before any work is done: flags, and functions by what they can be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["check_flags", "check_loss", "takes"]


def check_flags(**flags: object) -> None:
    """``TypeError`` for what is neither True nor False.

    >>> check_flags(verify="no")
    Traceback (most recent call last):
    TypeError: verify='no': expected True or False
    """
    for argument, value in flags.items():
        if not isinstance(value, bool):
            given = f"{argument}={value!r}" if isinstance(value, (str, int)) or value is None else argument
            raise TypeError(f"{given}: expected True or False")


def takes(function: Callable[..., Any], number: int) -> bool:
    """Return whether a function can be called with so many values; true of one that does not say.

    >>> takes(lambda output: 0, 2), takes(max, 2)
    (False, True)
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of functions in C
        return True
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def check_loss(loss_fn: object) -> None:
    """``TypeError`` for a loss that cannot be called with two arguments; None is none.

    >>> check_loss("cross_entropy")
    Traceback (most recent call last):
    TypeError: loss_fn='cross_entropy': expected a function of (output, target)
    """
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise TypeError(f"loss_fn={loss_fn!r}: expected a function of (output, target)")
    if not takes(loss_fn, 2):
        raise TypeError(
            "loss_fn: it is called with (output, target), or (model, batch) where batches are mappings, got"
            f" one of {inspect.signature(loss_fn)}"
        )
