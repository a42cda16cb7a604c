"""Tiny networks and loops for the tests of training."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxprune.training import Pruner

X = torch.ones(2, 6)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def normed(seed: int = 0) -> nn.Module:
    """A convolution, norms of two kinds, PReLU and an embedding-like parameter's layer that is not pruned."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 10),
        nn.LayerNorm(10), nn.Linear(10, 3),
    )  # fmt: skip


IMAGES = torch.ones(2, 1, 4, 4)


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def train_step(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def made(method: Any, sparsity: float | None = None, **options: Any) -> Pruner:
    return Pruner(mlp(), method, sparsity, example_inputs=X, **{"total": 6, **options})
