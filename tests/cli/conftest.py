"""A file of factories, and a folder of images."""

from pathlib import Path

import pytest
from PIL import Image

from fxprune import progress

FACTORIES = """
import torch
from torch import nn

def small():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return net, torch.ones(2, 6)

def bare():
    return small()[0]

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.ones(2, 1, 8, 8)

def wrong():
    return 3

def failing():
    return {}["weights"]

def asking(width):
    return nn.Linear(width, 4)

def data():
    return torch.randn(8, 6), torch.arange(8) % 4
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show no progress, which a busy machine would mix with the lines that tests read."""
    monkeypatch.setattr(progress, "PATIENCE", 1e6)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a folder of images for each class."""
    folder = tmp_path / "images"
    for label in ("bird", "cat"):
        (folder / label).mkdir(parents=True)
        for index in range(3):
            Image.effect_noise((40, 30), 64 + index).convert("RGB").save(folder / label / f"{index}.png")
    return folder
