"""Keep layers that are solved in a folder, so that a run that was killed goes on at the next one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from fxprune.scoring.data import Batch
from fxprune.scoring.distributed import gathered
from fxprune.scoring.forms import tensors_in
from fxprune.tensor_files import save_tensors
from fxprune.whole_files import whole_file

__all__ = ["SolvedLayers", "look"]

KEY = "fxprune_layer"
EMPTY: Mapping[str, Tensor] = MappingProxyType({})


def look(tensor: Tensor) -> list[Any]:
    """Return the shape, the sum and the sum of squares, which tell tensors apart.

    >>> look(torch.tensor([1.0, 2.0]))
    [[2], 3.0, 5.0]
    """
    wide = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().double()
    return [list(tensor.shape), float(wide.sum()), float(wide.square().sum())]


class SolvedLayers:
    """The solved layers of one run, a file for each: the mask, the new weights, and perhaps a bias.

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
        file = next((one for one in (self.folder, *self.folder.parents) if one.is_file()), None)
        if file is not None:
            raise ValueError(f"checkpoint_dir: {file} is a file; expected a folder, or a new name")
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Look for layers that were solved on the same data.

        Raises ``ValueError`` for layers of another run, or on other data, and for a damaged file.
        """
        group = self.group
        own = [[look(one) for one in tensors_in((batch.inputs,))] for batch in batches]
        self.facts = {**self.facts, "data": own if group is None else gathered(own, group)}
        self.facts = json.loads(json.dumps(self.facts))
        names = [file.name.removesuffix(".safetensors") for file in self.folder.glob("*.safetensors")]
        # All processes have to skip the same layers.
        self.names = frozenset(names if group is None else gathered(sorted(names), group)[0])
        for name in sorted(self.names):
            self._check(name)

    def load(self, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the mask, the new weights and the biases by name of a layer that is in ``names``."""
        with safe_open(self._file(name), "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}
        return found.pop("mask"), found.pop("weight"), found

    def save(self, name: str, mask: Tensor, weight: Tensor, biases: Mapping[str, Tensor] = EMPTY) -> None:
        """Write a layer, with the biases that were found with it, wholly or not at all."""
        if not self.writes:
            return
        # Full names of biases hold a dot, or are not these two words.
        tensors = {"mask": mask, "weight": weight, **biases}
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with whole_file(self._file(name)) as part:
            save_tensors(tensors, part, {KEY: json.dumps(self.facts)})

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
