"""Norms over channels of which some were removed compute what they computed with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune

GONE = [0, 3, 4]


class Positions(nn.Module):
    """Removed features are constants, another one at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.positions = nn.Parameter(torch.rand(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x) + self.positions[: x.shape[1]]))
        return y


def zeroed(net: Positions, biases: bool) -> Positions:
    with torch.no_grad():
        net.first.weight[GONE] = 0
        net.last.weight[:, GONE] = 0
        if biases:
            net.positions[:, GONE] = 0
    return net.eval()


def test_constants_that_differ_by_position() -> None:
    net, x = zeroed(Positions(), biases=False), torch.randn(2, 5, 3)
    small = fxprune.compact(net, x)
    assert small.get_parameter("first.weight").shape == (5, 3)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)


def test_constants_that_are_the_same_everywhere_fit_any_number_of_positions() -> None:
    net, x = zeroed(Positions(), biases=True), torch.randn(2, 5, 3)
    small = fxprune.compact(net, x)
    assert small.get_parameter("first.weight").shape == (5, 3)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)
        shorter = torch.randn(2, 3, 3)
        assert torch.allclose(small(shorter), net(shorter), atol=1e-5)
