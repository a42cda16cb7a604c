"""Progress on stderr, once something has taken over a second: bars on a terminal, else a line a stage."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from fxprune.keywords import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds before anything is shown."""

PAUSE = 10.0
"""Seconds from one line about a stage to the next, where there is no terminal."""


class Display:
    """Steps of known or unknown length, shown on stderr: as bars on a terminal, as lines elsewhere.

    >>> list(Display(enabled=False)(range(3), "counting", 3))
    [0, 1, 2]
    """

    def __init__(
        self, *, enabled: bool = True, console: Console | None = None, file: TextIO | None = None
    ) -> None:
        if enabled not in (True, False):
            raise TypeError(f"progress={enabled!r}: expected True or False")
        self.console = console
        self.enabled = enabled
        self.file = file

    def __call__(self, steps: Iterable[T], description: str | Callable[[], str], total: int) -> Iterator[T]:
        """``steps``, unchanged, with a bar that moves by one for each; a function's words may change."""
        words = description if callable(description) else lambda: description
        with self._shown(words(), total) as advance:
            for step in steps:
                yield step
                advance(words())

    @contextmanager
    def step(self, description: str) -> Iterator[None]:
        """A stretch of work of unknown length."""
        with self._shown(description, None):
            yield

    @contextmanager
    def _shown(self, description: str, total: int | None) -> Iterator[Callable[[str], None]]:
        """Show that work goes on once ``PATIENCE`` is over; yields a function that moves it by one."""
        if not self.enabled:
            yield lambda words: None
            return
        terminal = self.console.is_terminal if self.console is not None else sys.stderr.isatty()
        if terminal and self.file is None:
            bar = _make_bar(self.console)
            task = bar.add_task(description, total=total)
            with _after(bar.start, bar.stop):
                yield lambda words: bar.update(task, advance=1, description=words)
            return
        lines = _Lines(self.file or sys.stderr, description, total)
        with _after(lines.begin, lambda: None):
            yield lines.advance


@contextmanager
def _after(begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    """Call ``begin`` once ``PATIENCE`` is over, and then ``end`` when the work is done."""
    lock = threading.Lock()
    over = shown = False

    def show() -> None:
        nonlocal shown
        with lock:
            if not over:
                begin()
                shown = True

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
        if shown:
            end()


class _Lines:
    """Lines about one stage: that it began, and of many steps now and then how many are done."""

    def __init__(self, file: TextIO, description: str, total: int | None) -> None:
        self.file, self.description, self.total = file, description, total
        self.done, self.start = 0, time.monotonic()
        self.last: float | None = None

    def begin(self) -> None:
        self.last = time.monotonic()
        much = "" if self.total is None else f": {counted(self.total, 'step')}"
        self._print(f"{self.description}{much}")

    def advance(self, words: str) -> None:
        self.done += 1
        now = time.monotonic()
        if self.total is None or self.last is None or now - self.last < PAUSE:
            return
        self.last = now
        left = (now - self.start) / self.done * (self.total - self.done)
        self._print(f"{words}: {self.done} of {self.total}, about {left:.0f} s left")

    def _print(self, text: str) -> None:
        self.file.write(f"fxprune: {text}\n")
        self.file.flush()


def _make_bar(console: Console | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        console=Console(stderr=True) if console is None else console,
        transient=True,
    )
