"""Write files in full or not at all: what was there stays until the new one is complete."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_file_name", "check_folder_of", "named", "put_in_place", "whole_file", "write_text"]


def check_file_name(
    path: object, argument: str = "path", example: str = "net.safetensors", kind: str = "a file"
) -> None:
    """``TypeError`` for what is no name of a file.

    >>> check_file_name(3)
    Traceback (most recent call last):
    TypeError: path: got a int, expected the name of a file, as in 'net.safetensors'
    """
    if not isinstance(path, (str, os.PathLike)):
        got = f"got a {type(path).__name__}, expected the name of {kind}"
        raise TypeError(f"{argument}: {got}, as in {example!r}")


def check_folder_of(path: str | os.PathLike[str]) -> None:
    """``FileNotFoundError`` where the folder of a file that is to be written is not there."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{os.fspath(path)}: there is no folder {folder}; make it first")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, and move the file there when it is complete.

    Links are followed; a device or a pipe is written to as it is. A file that was there keeps its
    permissions, a new one has those that the system gives new files. ``OSError`` that names ``path`` where
    it cannot be written, by which nothing is left behind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(f"{folder}/a.txt") as part:
    ...         _ = part.write_text("all of it")
    ...     print(os.listdir(folder))
    ['a.txt']
    """
    check_file_name(path)
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)}: this is a folder; expected the name of a file")
    check_folder_of(path)
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        yield target
        return
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with named(path):
            part.touch()
            mode = stat.S_IMODE(part.stat().st_mode)
            yield part
            part.chmod(mode)  # safetensors makes a file that its owner alone can read
            put_in_place(part, target)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, target: Path) -> None:
    """Move a complete file to its place; the permissions of a file that was there stay."""
    if target.is_file():
        part.chmod(stat.S_IMODE(target.stat().st_mode))
    os.replace(part, target)


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an ``OSError`` of writing name the file that was to be written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        text = f"{os.fspath(path)}: not written ({why}); what was there is as it was"
        raise type(error)(text) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text in UTF-8, in full or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
