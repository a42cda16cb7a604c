"""A small network, its channel groups, and times of layers that nobody measured."""

from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.channels.groups import Groups, group_channels
from fxprune.latency.layers import Layer

CPU = torch.device("cpu")
X = torch.ones(2, 3, 6, 6)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


def time_of(layer: Layer, outputs: float, inputs: float) -> float:
    """An invented time that is linear along each width."""
    return 1 + 0.01 * outputs * (1 if layer.is_depthwise else inputs) * (len(layer.kernel) + 1)


def groups_of(model: nn.Module) -> tuple[Any, Groups]:
    gm = fxprune.capture(model, X)
    return gm, group_channels(fxprune.lower(gm))
