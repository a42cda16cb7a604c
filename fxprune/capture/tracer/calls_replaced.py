"""Replace ``nn.Module.__call__`` while traces run, once for all traces of one piece of work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["calls_go_to", "replaced_calls"]


class _Calls:
    """Count who needs the replacement, and hold what takes the calls; the last one is in charge."""

    def __init__(self) -> None:
        self.users = 0
        self.takers: list[Callable[..., Any]] = []
        self.original: Callable[..., Any] = nn.Module.__call__


_calls = _Calls()


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    takers = _calls.takers
    return (takers[-1] if takers else _calls.original)(module, *args, **kwargs)


@contextmanager
def replaced_calls() -> Iterator[None]:
    """Replace ``nn.Module.__call__`` for as long as the context lasts; calls do what they did.

    Python forgets what it knows of all classes of modules whenever the method is set, which takes longer than
    the trace of a small module: what traces many of them does so in this context.

    >>> with replaced_calls():
    ...     nn.Identity()(1)
    1
    """
    # Some operations import it when they first run, and it keeps the ``nn.Module.__call__`` of that moment.
    importlib.import_module("torch._dynamo")
    if not _calls.users:
        _calls.original = nn.Module.__call__
        setattr(nn.Module, "__call__", _call)  # noqa: B010
    _calls.users += 1
    try:
        yield
    finally:
        _calls.users -= 1
        if not _calls.users:
            setattr(nn.Module, "__call__", _calls.original)  # noqa: B010


@contextmanager
def calls_go_to(taker: Callable[..., Any]) -> Iterator[None]:
    """Let ``taker(module, *args, **kwargs)`` take the calls of modules.

    >>> with calls_go_to(lambda module, x: x + 1):
    ...     nn.Identity()(1)
    2
    """
    with replaced_calls():
        _calls.takers.append(taker)
        try:
            yield
        finally:
            _calls.takers.remove(taker)
