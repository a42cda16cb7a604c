"""Statistics over channels that no norm divides by: the graph follows no path through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from rewrite.compact.masked import assert_compacts, assert_same, outputs

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of squares": lambda y: (y * y).mean(-1),
    "mean of all squares": lambda y: (y * y).mean(),
    "variance": lambda y: torch.var_mean(y, -1)[0],
    "deviation": lambda y: torch.std_mean(y, dim=-1, keepdim=True)[0],
    "channel by channel": lambda y: (y * y).mean(1),
    "one over a root": lambda y: (y + 1.0).rsqrt(),
    "its mean": lambda y: (y + 1.0).rsqrt().mean(-1),
}


class Returned(nn.Module):
    """The statistic is an output, or a factor of another layer's result."""

    def __init__(self, kind: str, factor: bool) -> None:
        super().__init__()
        self.kind, self.factor = kind, factor
        self.first, self.second, self.last = nn.Linear(4, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.first(x).relu()
        out: Tensor = self.last(self.second(y).relu())
        found = STATISTICS[self.kind](y)
        return out * found.reshape(-1)[:1] if self.factor else (out, found)


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_that_no_norm_holds_stay(kind: str, factor: bool) -> None:
    torch.manual_seed(0)
    net, x = Returned(kind, factor).eval(), torch.randn(2, 5, 4)
    with torch.no_grad():
        net.second.weight[:, :3] = 0.0
        net.first.weight[[0, 3]], net.first.bias[[0, 3]] = 0.0, 0.0
        net.second.weight[:, 3] = 0.0
    small = fxprune.compact(net, x, verify=False)
    for some in (x, torch.randn(3, 5, 4)):
        assert_same(outputs(net, some), outputs(small, some))


def test_zeros_that_a_mean_of_squares_counts_go() -> None:
    torch.manual_seed(0)
    net, x = Returned("mean of squares", False).eval(), torch.randn(2, 5, 4)
    with torch.no_grad():
        net.first.weight[:3], net.first.bias[:3] = 0.0, 0.0
    small = fxprune.compact(net, x, verify=False)
    assert_same(outputs(net, x), outputs(small, x))
    assert len(small.get_parameter("first.weight")) == 7


class Moments(nn.Module):
    """A layer norm whose variance is the difference of two moments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        mean = y.mean(-1, keepdim=True)
        variance = y.pow(2).mean(-1, keepdim=True) - mean.pow(2)
        out: Tensor = self.last((y - mean) / torch.sqrt(variance + 1e-5))
        return out


def test_variances_as_differences_of_moments() -> None:
    torch.manual_seed(0)
    small = assert_compacts(Moments().eval(), torch.randn(2, 5, 4), 0.5)
    assert len(small.get_parameter("first.weight")) < 7
