"""The attributes of modules that say how many channels they have are those of the smaller module."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import fxprune

GONE = [0, 3, 4]


class Net(nn.Module):
    """Eight channels that are scaled by a constant of the model, and pass slopes and norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope, self.norm = nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 1)
        self.register_buffer("scale", torch.arange(1.0, 9.0).view(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.slope(self.first(x))) * self.scale)
        return y


def zeroed() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.first.weight[GONE] = 0
        net.first.bias[GONE] = 0
        net.last.weight[:, GONE] = 0
    return net, torch.randn(2, 3, 4, 4)


def test_sizes_of_modules_and_constants_are_those_that_stay() -> None:
    net, x = zeroed()
    small = fxprune.compact(net, x)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)
    first, slope, norm, last = (small.get_submodule(name) for name in ("first", "slope", "norm", "last"))
    assert (first.out_channels, slope.num_parameters, norm.num_features, last.in_channels) == (5, 5, 5, 5)
    assert small.get_buffer("scale").shape == (5, 1, 1)


def test_a_graph_module_without_shapes_is_captured_first() -> None:
    net, x = zeroed()
    small = fxprune.compact(fx.symbolic_trace(net), x)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)
    assert small.get_parameter("first.weight").shape[0] == 5


def test_groups_of_a_transposed_convolution_lose_other_channels_each() -> None:
    """Three inputs and two outputs per group: one input of either group goes, another one in each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        for channel in (0, 4):
            net[0].weight[channel] = 0
            net[0].bias[channel] = 0
    x = torch.randn(2, 3, 4, 4)
    small = fxprune.compact(net, x)
    assert small.get_parameter("1.weight").shape == (4, 2, 3, 3)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)
