"""Write tensors to a safetensors file, with errors of the system's own words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file

__all__ = ["save_tensors"]


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; ``OSError`` where it cannot be, with the system's reason alone."""
    facts = None if metadata is None else dict(metadata)
    if path.exists() and not path.is_file():  # a device, in whose place `save_file` would move a file
        path.write_bytes(save(dict(tensors), facts))
        return
    try:
        save_file(dict(tensors), path, facts)
    except SafetensorError as error:
        reason = str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        raise OSError(reason) from error
