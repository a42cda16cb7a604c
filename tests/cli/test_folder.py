"""Folders of ``prune --out``: those that cannot be read back say what to do."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli.folder import read_folder


def test_a_folder_that_does_not_say_of_which_model(tmp_path: Path) -> None:
    fxprune.save(nn.Linear(2, 2), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not say of which model; expected a folder of prune --out$"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"of transformers it is hf:{tmp_path}$"):
        read_folder(tmp_path)


@pytest.mark.slow
def test_files_of_networks_are_readable_as_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    fxprune.save(nn.Linear(2, 2), tmp_path / "a.safetensors")
    fxprune.export(nn.Linear(2, 2), tmp_path / "a.pt2", torch.ones(2, 2))
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert set(modes.values()) == {modes["usual"]}
    (tmp_path / "a.pt2").chmod(0o640)
    fxprune.export(nn.Linear(2, 2), tmp_path / "a.pt2", torch.ones(2, 2))
    assert (tmp_path / "a.pt2").stat().st_mode & 0o777 == 0o640
