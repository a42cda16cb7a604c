"""Files of tensors: errors in the system's words, and devices that stay what they are."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from fxprune.tensor_files import save_tensors


def test_tensors_are_written(tmp_path: Path) -> None:
    save_tensors({"a": torch.arange(3)}, tmp_path / "a", {"key": "value"})
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.arange(3))


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # as on a full disk, a write fails
    try:
        with pytest.raises(OSError, match=r"^File too large$"):
            save_tensors({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_tensors({"a": torch.ones(2)}, pipe)
    assert torch.equal(load(os.read(reader, 1000))["a"], torch.ones(2))
    os.close(reader)
    assert pipe.is_fifo()
