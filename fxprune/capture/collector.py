"""Pause Python's garbage collector while a graph is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no garbage for as long as the context lasts.

    A trace makes many objects that all live on to its end. Each fourth part of them would make the collector
    look through everything that is imported, which takes longer than the trace of a small network.

    >>> with collector_paused():
    ...     gc.isenabled()
    False
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
