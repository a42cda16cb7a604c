"""Progress on stderr, once something has taken over a second; nothing where nobody is watching."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds before anything is shown."""


class Display:
    """Steps of known or unknown length, shown as bars on stderr where that is a terminal.

    >>> list(Display(enabled=False)(range(3), "counting", 3))
    [0, 1, 2]
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console
        self.enabled = enabled and (sys.stderr.isatty() if console is None else console.is_terminal)

    def __call__(self, steps: Iterable[T], description: str | Callable[[], str], total: int) -> Iterator[T]:
        """``steps``, unchanged, with a bar that moves by one for each; a function's words may change."""
        words = description if callable(description) else lambda: description
        with self._bar(words(), total) as advance:
            for step in steps:
                yield step
                advance(words())

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """A stretch of work of unknown length."""
        with self._bar(description, None):
            yield

    @contextmanager
    def _bar(self, description: str, total: int | None) -> Iterator[Callable[[str], None]]:
        """Show a bar once ``PATIENCE`` is over; yields a function that moves it by one, with new words."""
        if not self.enabled:
            yield lambda words: None
            return
        bar = _make_bar(self.console)
        task = bar.add_task(description, total=total)
        lock = threading.Lock()
        over = shown = False

        def show() -> None:
            nonlocal shown
            with lock:
                if not over:
                    bar.start()
                    shown = True

        timer = threading.Timer(PATIENCE, show)
        timer.daemon = True
        timer.start()
        try:
            yield lambda words: bar.update(task, advance=1, description=words)
        finally:
            timer.cancel()
            with lock:
                over = True
            if shown:
                bar.stop()


def _make_bar(console: Console | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True) if console is None else console,
        transient=True,
    )
