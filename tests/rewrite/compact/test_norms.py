"""Norms over channels of which some were removed compute what they computed with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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


class Residual(nn.Module):
    """A stream of channels with norms of one kind before its layers."""

    def __init__(self, norm: Callable[[], nn.Module], last: bool) -> None:
        super().__init__()
        self.stem, self.norms = nn.Linear(4, 24), nn.ModuleList(norm() for _ in range(3))
        self.first, self.second, self.head = nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.last = last

    def normed(self, place: int, x: Tensor) -> Tensor:
        norm = self.norms[place]
        out: Tensor = norm(x) if self.last else norm(x.transpose(1, 2)).transpose(1, 2)
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(0, self.stem(x))
        x = x + self.second(self.first(self.normed(1, x)).relu())
        out: Tensor = self.head(self.normed(2, x))
        return out


STREAMS = {
    "layer": (lambda: nn.LayerNorm(24), True),
    "rms": (lambda: nn.RMSNorm(24), True),
    "group": (lambda: nn.GroupNorm(4, 24), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_norm_that_lost_channels_loses_more(kind: str, captured: bool) -> None:
    torch.manual_seed(0)
    net, x = Residual(*STREAMS[kind]).double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    small, widths = fxprune.capture(net, x), []
    for seed in range(3):
        given = {} if captured else {"example_inputs": x}
        pruned = fxprune.apply(
            small, "random", 0.3, granularity="channel", progress=False, seed=seed, **given
        ).eval()
        small = fxprune.compact(pruned)
        table = small.meta["fxprune"]["compaction"]
        assert table.given_back == 0, str(table)
        torch.testing.assert_close(small(x), pruned(x), rtol=1e-9, atol=1e-9)
        widths.append(small.get_parameter("stem.weight").shape[0])
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < widths[0] < 24
    plain = fxprune.compact(pruned, exact=False)
    assert plain(x).shape == (2, 5, 3)
