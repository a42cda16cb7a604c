"""Keep layers that are solved in a folder, so that a run that was killed goes on at the next one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from fxprune.scoring.data import Batch
from fxprune.scoring.distributed import gathered
from fxprune.scoring.forms import tensors_in

__all__ = ["SolvedLayers"]

KEY = "fxprune_layer"


def _look(tensor: Tensor) -> list[Any]:
    """Numbers that tell tensors apart."""
    wide = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().double()
    return [list(tensor.shape), float(wide.sum()), float(wide.square().sum())]


class SolvedLayers:
    """The solved layers of one run, a file for each: the mask and the new weights.

    Args:
        folder: made if it is not there. Several processes share it; the first of them writes.
        facts: all that decides how layers are solved, but the data: JSON values.
        group: the processes that solve together.

    ``names`` are the layers that are there, when :meth:`begin` was called.

    >>> import tempfile
    >>> folder, mask = tempfile.mkdtemp(), torch.tensor([True, False])
    >>> SolvedLayers(folder, {"damp": 0.1}).save("a.weight", mask, torch.tensor([2.0, 0.0]))
    >>> SolvedLayers(folder, {"damp": 0.1}).load("a.weight")[1].tolist()
    [2.0, 0.0]
    """

    def __init__(
        self, folder: str | os.PathLike[str], facts: Mapping[str, Any], group: ProcessGroup | None = None
    ) -> None:
        self.folder, self.facts, self.group = Path(folder), dict(facts), group
        self.writes = group is None or torch.distributed.get_rank(group) == 0
        self.names: frozenset[str] = frozenset()
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Look for layers that were solved on the same data.

        Raises ``ValueError`` for layers of another run, or on other data, and for a damaged file.
        """
        group = self.group
        own = [[_look(one) for one in tensors_in((batch.inputs,))] for batch in batches]
        self.facts = {**self.facts, "data": own if group is None else gathered(own, group)}
        self.facts = json.loads(json.dumps(self.facts))
        names = [file.name.removesuffix(".safetensors") for file in self.folder.glob("*.safetensors")]
        # All processes have to skip the same layers.
        self.names = frozenset(names if group is None else gathered(sorted(names), group)[0])
        for name in sorted(self.names):
            self._check(name)

    def load(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mask and the new weights of a layer that is in ``names``."""
        with safe_open(self._file(name), "pt") as file:
            return file.get_tensor("mask"), file.get_tensor("weight")

    def save(self, name: str, mask: Tensor, weight: Tensor) -> None:
        """Write a layer, wholly or not at all."""
        if not self.writes:
            return
        tensors = {"mask": mask.cpu().contiguous(), "weight": weight.detach().cpu().contiguous()}
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            save_file(tensors, temporary, metadata={KEY: json.dumps(self.facts)})
            os.replace(temporary, self._file(name))
        finally:
            temporary.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _check(self, name: str) -> None:
        path = self._file(name)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"checkpoint_dir: {path} is damaged ({error}); delete it") from error
        found = json.loads(metadata.get(KEY, "null"))
        if found == self.facts:
            return
        odd = [key for key in self.facts if not isinstance(found, dict) or found.get(key) != self.facts[key]]
        raise ValueError(
            f"checkpoint_dir: {path} is of another run (other {', '.join(odd)}); take another folder, or "
            "empty this one"
        )
