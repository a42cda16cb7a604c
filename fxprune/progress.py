"""Progress on stderr, once something has taken over a second; nothing where nobody is watching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds before anything is shown."""


class Display:
    """Steps of known or unknown length, shown as bars on stderr where that is a terminal.

    >>> list(Display(enabled=False)(range(3), "counting", 3))
    [0, 1, 2]
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.enabled = enabled and self.console.is_terminal

    def __call__(self, steps: Iterable[T], description: str | Callable[[], str], total: int) -> Iterator[T]:
        """``steps``, unchanged, with a bar that moves by one for each; a function's words may change."""
        words = description if callable(description) else lambda: description
        with self._bar(words(), total) as (bar, task):
            for step in steps:
                yield step
                bar.update(task, advance=1, description=words())

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """A stretch of work of unknown length."""
        with self._bar(description, None):
            yield

    @contextmanager
    def _bar(self, description: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
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
        if self.enabled:
            timer.start()
        try:
            yield bar, task
        finally:
            timer.cancel()
            with lock:
                over = True
            if shown:
                bar.stop()
