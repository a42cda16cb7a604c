"""Networks whose training goes another way before other layers train on as smaller ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from rewrite.compact.masked import assert_same, redrawn

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
LARGER = torch.randn(3, 3, 10, 8, generator=torch.Generator().manual_seed(1))
Way = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two layers, of which ``way`` chooses, and others behind them."""

    def __init__(self, way: Way, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.extra, self.token = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(1, 8, 1, 1))
        self.between, self.last = nn.Conv2d(width, 12, 1), nn.Linear(12, 4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.between(self.way(self, x)).relu().mean((2, 3)))
        return y


def either(net: Net, x: Tensor) -> Tensor:
    first, second = net.first(x).relu(), net.second(x).relu()
    chosen: Tensor = first if net.training else second
    return chosen


def one_more(net: Net, x: Tensor) -> Tensor:
    y = net.first(x).relu()
    added = net.extra(y) if net.training else None
    return y if added is None else y + added


def instead(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.first(x).relu()
    return net.extra(y) if net.training else y


def parameter(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.first(x)
    return y + net.token if net.training else y


def added_to_nothing(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.first(x)
    return y + (net.extra(y) if net.training else 0.0)


def scaled_by_one(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.first(x)
    return y * (net.second(x).sigmoid() if net.training else 1.0)


def fewer_places(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.first(x)
    return y[:, :, ::2] if net.training else y


def other_order(net: Net, x: Tensor) -> Tensor:
    pair = net.first(x), net.second(x)
    return torch.cat(pair if net.training else pair[::-1], 1)


def twice(net: Net, x: Tensor) -> Tensor:
    chosen = either(net, x)
    extra: Tensor = net.extra(chosen)
    return chosen + extra if net.training else extra


WAYS = [
    either, one_more, instead, parameter, added_to_nothing, scaled_by_one, fewer_places, other_order, twice,
]  # fmt: skip


def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    with torch.no_grad():
        return [copy.deepcopy(model).double().train(training)(x.double())]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_both_modes_are_those_of_the_masked_network(way: Way) -> None:
    net = redrawn(Net(way, width=16 if way is other_order else 8))
    pruned = fxprune.apply(net, "random", 0.5, granularity="channel", example_inputs=X, seed=1)
    small = fxprune.compact(pruned, X)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in fxprune.masks(pruned).items():
            masked.get_parameter(name).mul_(mask)
    for training in (True, False):
        for x in (X, LARGER):
            assert_same(outputs(masked, x, training), outputs(small, x, training))
    assert small.first.weight.shape[0] < 8 or way is twice
    small.train()(X).square().mean().backward()
    read = small.first.weight.grad
    assert read is not None
    assert read.any()


def test_a_channel_that_evaluation_alone_does_not_use_stays() -> None:
    net = redrawn(Net(either))
    with torch.no_grad():
        net.second.weight[:3].zero_(), net.second.bias[:3].zero_()
        net.first.weight[2:4].zero_(), net.first.bias[2:4].zero_()
    small = fxprune.compact(net, X)
    assert small.first.weight.shape[0] == small.second.weight.shape[0] == 7  # channel 2 is in neither
    for training in (True, False):
        assert_same(outputs(net, X, training), outputs(small, X, training))


def test_constants_that_differ_between_the_modes_stay() -> None:
    net = redrawn(Net(either))
    with torch.no_grad():
        net.first.weight[:3].zero_(), net.second.weight[:3].zero_()  # biases differ
        net.first.bias[0] = net.second.bias[0]
    small = fxprune.compact(net, X)
    for training in (True, False):
        assert_same(outputs(net, X, training), outputs(small, X, training))


def test_groups_hold_the_channels_of_both_modes() -> None:
    groups = fxprune.channel_groups(Net(either), X)
    first = next(group for group in groups if group.removable)
    members = {(member.parameter, member.axis) for member in first.members}
    assert {("first.weight", "out"), ("second.weight", "out"), ("between.weight", "in")} <= members


class FollowsItsMean(nn.Module):
    """Subtracts a mean that training alone writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        result: Tensor = self.last((y - self.mean).relu())
        return result


def test_buffers_that_training_writes_are_what_they_were() -> None:
    torch.manual_seed(0)
    model, x = FollowsItsMean().eval(), torch.randn(5, 6)
    pruned = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False
    ).eval()
    small = fxprune.compact(pruned, x)
    assert torch.allclose(small(x), pruned(x), atol=1e-6)
    assert not any(bool(network.get_buffer("mean").any()) for network in (pruned, small))
