"""Keep a run of ``fxprune train`` in a folder: the state of each variant after every epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxprune.training import checkpoints

__all__ = ["SavedRun"]

FACTS = "run.json"


class SavedRun:
    """The folder of one run.

    Args:
        folder: where it is; made if it is not there.
        facts: what tells runs apart.
        epochs: how many are wanted.
        resume: whether to go on with what is there.

    ``scheduled``: the epochs that the run was begun with, which its schedules count on; later ones train with
    the masks and the learning rate of then. ``trained``: whether an epoch was trained by this object.

    Raises ``ValueError`` where the folder holds a run that is not to be resumed, one of other facts, or one
    of more epochs.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], epochs: int, *, resume: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder}: there is a file of that name; expected a folder")
        self.folder = folder
        self.trained = False
        self.scheduled = epochs
        self._facts = facts
        path = folder / FACTS
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise ValueError(f"--out {folder}: holds a run; --resume goes on with it, or take another folder")
        for key in {**known["facts"], **facts}:
            before, now = known["facts"].get(key), facts.get(key)
            if before != now:
                raise ValueError(f"--out {folder}: a run with {key}={before!r}, not {now!r}")
        self.scheduled = int(known["epochs"])
        if epochs < self.scheduled:
            raise ValueError(f"--epochs {epochs}: the run in {folder} was begun with {self.scheduled}")

    def begin(self) -> None:
        """Write what the run is, if it is new; a run whose arguments were refused leaves none behind."""
        path = self.folder / FACTS
        if not path.is_file():
            text = json.dumps({"facts": dict(self._facts), "epochs": self.scheduled}, indent=2)
            checkpoints.write_bytes(path, f"{text}\n".encode())

    def read(self, variant: str) -> dict[str, Any] | None:
        """Return the last state of a variant; None where it has not begun."""
        path = self._path(variant)
        return checkpoints.read(path) if path.is_file() else None

    def write(self, variant: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a variant after an epoch."""
        self.trained = True
        checkpoints.write(self._path(variant), state)

    def _path(self, variant: str) -> Path:
        return self.folder / f"{variant}.ckpt"
