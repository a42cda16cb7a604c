"""Any one channel group of any network: removed, nothing is given back, and outputs are those with zeros."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from channels.removal import zero_group
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from lowering.strategies import MENU, Architecture, Block, Shape, architectures
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


class Copied(Block):
    """Channels copied by a repeat, each by itself or all together, beside others."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.how = self.pick("repeat", "interleave", "cat", "flip")
        self.layer = nn.Conv2d(shape[0], 2 * shape[0], 1, bias=self.chance())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "repeat":
            twice = x.repeat(1, 2, 1, 1)
        elif self.how == "interleave":
            twice = x.repeat_interleave(2, 1)
        else:
            twice = torch.cat([x, x.flip(1) if self.how == "flip" else x], 1)
        return twice + self.layer(x)


class Pixels(Block):
    """Channels become positions, and back."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.before = nn.Conv2d(shape[0], 8, 1, bias=self.chance())
        self.middle = nn.Conv2d(2, 2, 3, padding=1, groups=self.pick(1, 2), bias=self.chance())
        self.after = nn.Conv2d(8, 4, 1, bias=self.chance())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.pixel_unshuffle(self.middle(F.pixel_shuffle(self.before(x), 2)), 2))


class ToImage(Block):
    """A vector becomes an image."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.layer = nn.Linear(shape[-1], 16, bias=self.chance())
        self.last = self.pick(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=self.pick(1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).view(-1, 4, 2, 2))


WIDE = {
    3: (*MENU[3], Copied, Copied, Pixels, Pixels),
    2: MENU[2],
    1: (*MENU[1], ToImage, ToImage),
}


def check(architecture: Architecture, seed: int) -> None:
    """Remove one group, with or without a layer that is excluded."""
    model, example = architecture.build(WIDE)
    note(str(model))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_() if parameter.dim() > 1 else parameter.uniform_(0.2, 1.0)
    graph = fxprune.lower(fxprune.capture(model, example))
    excluded = [sorted(graph.kernels)[seed % len(graph.kernels)]] if seed % 2 else []
    free = [group for group in fxprune.channel_groups(model, example, exclude=excluded) if group.removable]
    assume(free)
    group = random.Random(seed).choice(free)
    assert not {member.parameter for member in group.members if member.axis == "out"} & set(excluded)
    note(str(group))
    # Channels that nothing reads are dead before anything is removed.
    before = fxprune.compact(model, example).meta["fxprune"]["compaction"]
    zero_group(model, graph, group)
    small = fxprune.compact(model, example)
    table = small.meta["fxprune"]["compaction"]
    note(str(table))
    assert table.given_back == before.given_back
    gone = before.parameters[1] - table.parameters[1]
    assert gone == group.parameters if before.parameters[1] == before.parameters[0] else gone >= 0
    with torch.no_grad():
        wanted, found = model(example), small(example)
    assert torch.allclose(wanted, found, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.slow
@settings(max_examples=5, **SETTINGS)
@given(architectures("image"), st.integers(0, 99))
def test_images(architecture: Architecture, seed: int) -> None:
    check(architecture, seed)


@pytest.mark.slow
@settings(max_examples=5, **SETTINGS)
@given(architectures("tokens"), st.integers(0, 99))
def test_tokens(architecture: Architecture, seed: int) -> None:
    check(architecture, seed)


@pytest.mark.slow
@settings(max_examples=5, **SETTINGS)
@given(architectures("vector"), st.integers(0, 99))
def test_vectors(architecture: Architecture, seed: int) -> None:
    check(architecture, seed)
