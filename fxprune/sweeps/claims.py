"""Divide the cells of a grid among processes and machines that share a folder, by files made at most once.

A cell is claimed by making the file ``NAME.0.claim``, which fails where it is there already. Whoever holds a
claim touches it now and then. A claim whose process is gone is taken over by making ``NAME.1.claim``, and so
on: of several that try, one succeeds. A result is written whole, and only by the holder of the last claim.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxprune.training.checkpoints import write_bytes

__all__ = ["ALIVE", "BEAT", "Claims"]

BEAT = 15.0
"""Seconds from one touch of a claim to the next."""

ALIVE = 120.0
"""Seconds after which a claim that is not touched counts as given up, on another machine."""

_CLAIM = re.compile(r"(.+)\.(\d+)\.claim")


class Claims:
    """The cells in a folder: their results, and who is at work on the others.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     claims = Claims(Path(folder))
    ...     with claims.claim("cell") as mine:
    ...         mine, Claims(Path(folder)).is_claimed("cell"), claims.write("cell", {"x": 1})
    ...     claims.read("cell"), claims.is_claimed("cell")
    (True, True, True)
    ({'x': 1}, False)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, Path] = {}

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the result of a cell; None where there is none yet."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def write(self, name: str, result: dict[str, Any]) -> bool:
        """Keep the result of a cell that is claimed; return False where another has taken the claim over."""
        if self._last(name) != self._held.get(name):
            return False
        write_bytes(self.folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        return True

    def is_claimed(self, name: str) -> bool:
        """Return whether somebody who is alive works on a cell."""
        last = self._last(name)
        return last is not None and not self._is_given_up(last)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claim a cell for a stretch of work; yields False where another has it, or its result is there."""
        path = self._try(name)
        if path is None or self.read(name) is not None:
            if path is not None:
                path.unlink(missing_ok=True)
            yield False
            return
        self._held[name] = path
        over = threading.Event()
        beating = threading.Thread(target=_touch, args=(path, over), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            over.set()
            beating.join()
            del self._held[name]
            path.unlink(missing_ok=True)

    def _try(self, name: str) -> Path | None:
        last = self._last(name)
        if last is not None and not self._is_given_up(last):
            return None
        number = 0 if last is None else _number(last) + 1
        path = self.folder / f"{name}.{number}.claim"
        # The content is there as soon as the name is: a link to a file that was written before.
        draft = self.folder / f".{uuid.uuid4().hex}"
        draft.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
        try:
            os.link(draft, path)
        except FileExistsError:
            return None
        finally:
            draft.unlink()
        return path

    def _last(self, name: str) -> Path | None:
        claims = [
            path
            for path in self.folder.glob("*.claim")
            if (m := _CLAIM.fullmatch(path.name)) and m[1] == name
        ]
        return max(claims, key=_number, default=None)

    def _is_given_up(self, path: Path) -> bool:
        try:
            holder, touched = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
        except FileNotFoundError:
            return False  # it has just ended; look again
        if holder["host"] == socket.gethostname() and not _runs(int(holder["pid"])):
            return True
        return self._now() - touched > ALIVE

    def _now(self) -> float:
        """The time by the clock of the folder, which machines that share it may not have."""
        draft = self.folder / f".{uuid.uuid4().hex}"
        draft.touch()
        now = draft.stat().st_mtime
        draft.unlink()
        return now


def _number(path: Path) -> int:
    match = _CLAIM.fullmatch(path.name)
    assert match is not None
    return int(match[2])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _touch(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        if path.exists():
            os.utime(path)
