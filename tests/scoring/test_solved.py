"""A run that was killed between two layers, and goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.scoring import sequential

X = torch.randn(128, 12, generator=torch.Generator().manual_seed(1))
DATA = (X, torch.zeros(128))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def prune(method: str, folder: Path | None, **options: Any) -> nn.Module:
    given = {} if folder is None else {"checkpoint_dir": str(folder)}
    return fxprune.apply(net(), method, 0.5, data=DATA, progress=False, **given, **options)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", ["sparsegpt", "obc", "alps", "dsnot"])
@pytest.mark.parametrize("propagate", [True, False])
def test_a_killed_run_goes_on_at_the_next_layer(
    method: str, propagate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = prune(method, None, propagate=propagate)
    seen: list[str] = []
    original = sequential._Run._layer

    def killed(self: Any, name: str, parts: Any) -> Any:
        seen.append(name)
        if name == "4.weight" and seen.count(name) == 1:
            raise KeyboardInterrupt
        return original(self, name, parts)

    monkeypatch.setattr(sequential._Run, "_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(method, tmp_path, propagate=propagate)
    found = prune(method, tmp_path, propagate=propagate)
    assert seen == ["0.weight", "2.weight", "4.weight", "4.weight"]
    for name, mask in fxprune.masks(wanted).items():
        assert torch.equal(mask, fxprune.masks(found)[name])
        assert torch.equal(wanted.get_parameter(name), found.get_parameter(name))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"damp": 0.5}, "damp"),
        ({"granularity": "2:4"}, "granularity"),
        ({"batches": 2, "data": [DATA, DATA]}, "batches, data"),
        ({"data": (X + 1, torch.zeros(128))}, "data"),
    ],
)
def test_layers_of_another_run_are_refused(other: dict[str, Any], what: str, tmp_path: Path) -> None:
    prune("sparsegpt", tmp_path)
    given = {"data": DATA, "progress": False, "checkpoint_dir": str(tmp_path), **other}
    with pytest.raises(ValueError, match=rf"checkpoint_dir: .* is of another run \(other {what}"):
        fxprune.apply(net(), "sparsegpt", 0.5, **given)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    prune("sparsegpt", tmp_path)
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"checkpoint_dir: .*{file.name} is damaged"):
        prune("sparsegpt", tmp_path)


def test_rounds_are_kept_apart(tmp_path: Path) -> None:
    wanted = prune("sparsegpt", None, schedule="linear(2)")
    for _ in range(2):
        found = prune("sparsegpt", tmp_path, schedule="linear(2)")
        for name, mask in fxprune.masks(wanted).items():
            assert torch.equal(mask, fxprune.masks(found)[name])
    assert len(list(tmp_path.iterdir())) == 2
