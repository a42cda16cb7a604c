"""Checkpoints that survive a kill: a state comes in, a whole file or none goes out.

A file is written under a temporary name, flushed to the disk and renamed; it begins with its own digest, so
that what is cut off or belongs to something else is told from what is whole. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import torch

from fxprune.whole_files import check_file_name, whole_file

MAGIC = b"fxprune checkpoint 1\n"
_PLAIN = (bool, int, float, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
_NAME = re.compile(r"step-(\d+)((?:\.rank\d+)?)\.ckpt")


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes ``state`` to ``path``, wholly or not at all; the file that was there stays until then.

    Raises ``TypeError`` for a value that is neither a tensor nor a plain number, text or container of such.
    """
    _check_plain(state, "state")
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    write_bytes(path, MAGIC + hashlib.sha256(payload).digest() + payload)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, wholly or not at all; the file that was there stays until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a file that :func:`write` wrote, on the CPU.

    Raises ``FileNotFoundError`` where there is none, and ``ValueError`` for a file that is cut off, changed,
    or not one of ours; the message names it.
    """
    where = os.fspath(path)
    content = Path(path).read_bytes()
    if not content.startswith(MAGIC[: max(1, min(len(content), len(MAGIC)))]):
        raise ValueError(f"{where}: not a checkpoint of fxprune")
    start = len(MAGIC) + hashlib.sha256().digest_size
    digest, payload = content[len(MAGIC) : start], content[start:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{where}: the checkpoint is cut off or damaged ({len(content)} bytes)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{where}: not a checkpoint of fxprune ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{where}: not a checkpoint of fxprune (it holds a {type(state).__name__})")
    return state


class Checkpoints:
    """The checkpoints of one training run, in a folder of its own.

    Args:
        folder: where they are; made when the first is written.
        keep: how many of them to keep, at least 2: the one before the latest is the spare.
        rank: of this process, where several train together and each keeps a file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Checkpoints(folder)
    ...     store.save(3, {"x": torch.ones(1)})
    ...     store.latest()
    (3, {'x': tensor([1.])})
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, rank: int = 0) -> None:
        check_file_name(folder, "checkpoint_dir", "checkpoints", "a folder")
        self.folder = Path(folder)
        self.keep = max(2, keep)
        self.suffix = f".rank{rank}" if rank else ""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"checkpoint_dir={str(folder)!r}: there is a file of that name; expected a folder"
            )

    def numbers(self) -> list[int]:
        """The numbers of the checkpoints that are there, readable or not, in order."""
        names = [path.name for path in self.folder.glob("step-*.ckpt")] if self.folder.is_dir() else []
        found = [match for name in names if (match := _NAME.fullmatch(name)) and match[2] == self.suffix]
        return sorted(int(match[1]) for match in found)

    def path(self, number: int) -> Path:
        """The file of a checkpoint."""
        return self.folder / f"step-{number:09d}{self.suffix}.ckpt"

    def save(self, number: int, state: Mapping[str, Any]) -> None:
        """Writes checkpoint ``number`` and lets go of the oldest."""
        write(self.path(number), state)
        for old in self.numbers()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def latest(self, at_most: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Number and state of the last checkpoint that can be read; None where there is none at all.

        Warns (``UserWarning``) of each that cannot be read and is passed over; ``ValueError`` where that is
        all of them.
        """
        errors = []
        for number in reversed(self.numbers()):
            if at_most is not None and number > at_most:
                continue
            try:
                state = read(self.path(number))
            except ValueError as error:
                errors.append(str(error))
                continue
            for text in errors:
                warnings.warn(f"{text}; checkpoint {number} before it is used", UserWarning, stacklevel=3)
            return number, state
        if errors:
            raise ValueError(f"{errors[0]}; no other is left in {self.folder}: remove it to start afresh")
        return None


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global random generators, of all devices."""
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, internal, following = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "python": [version, list(internal), following],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets the generators as :func:`random_state` found them."""
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() >= len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def states_of(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The states of optimisers, schedulers, scalers, samplers and ``torch.Generator`` objects, by name."""
    return {
        name: thing.get_state() if isinstance(thing, torch.Generator) else thing.state_dict()
        for name, thing in objects.items()
    }


def restore_states(objects: Mapping[str, Any], states: Mapping[str, Any], where: str) -> None:
    """Gives every object its state back; ``ValueError`` unless the names are the same."""
    if objects.keys() != states.keys():
        raise ValueError(
            f"{where}: it has the states of {sorted(states) or 'nothing'}, attached are {sorted(objects)};"
            " attach the same things"
        )
    for name, thing in objects.items():
        if isinstance(thing, torch.Generator):
            thing.set_state(states[name])
        else:
            thing.load_state_dict(states[name])


def check_attachable(objects: Mapping[str, Any]) -> None:
    """``TypeError`` for an object that has no state to keep."""
    for name, thing in objects.items():
        whole = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
        if not whole and not isinstance(thing, torch.Generator):
            raise TypeError(
                f"{name}={thing!r}: expected an object with state_dict and load_state_dict, or a"
                " torch.Generator"
            )


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple, set)) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, (*_PLAIN, torch.Tensor)):
        raise TypeError(
            f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text, and"
            " lists and dicts of them"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
