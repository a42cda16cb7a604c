"""A checkpoint of Lightning, pruned in place, goes into code that does not prune."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune


def test_a_checkpoint_of_lightning_is_loaded_without_masks(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: torch.Tensor) -> Any:
            return self.network(x)

    module = Net()
    fxprune.apply(module.network, "magnitude", 0.75, example_inputs=torch.ones(2, 8), returns="inplace")
    version = lightning.__version__
    torch.save(
        {"state_dict": module.state_dict(), "pytorch-lightning_version": version}, tmp_path / "last.ckpt"
    )
    plain = Net.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)
    assert not fxprune.masks(plain)
    x = torch.randn(3, 8)
    assert torch.equal(plain(x), module(x))
    assert fxprune.analyze(plain.network, example_inputs=x).sparsity == pytest.approx(0.75)
