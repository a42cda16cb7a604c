"""Granularities on a graph: transposed parameters, and channels with all that goes with them."""

from typing import Any

import pytest
import torch
from channels.grouping import graph_of
from torch import nn

from fxprune.channels.orientation import swap_orientation
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.channel_granularity import Oriented, fitted
from fxprune.sparsity.granularity import CHANNEL, KERNEL, NM, WEIGHT, Block, Channel, resolve
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import is_subset
from fxprune.sparsity.select import select


class Transposed(nn.Module):
    """Transposed convolutions, the second in two groups, the last depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ConvTranspose2d(4, 6, 2)
        self.two = nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.three = nn.ConvTranspose2d(8, 8, 2, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x)))


@pytest.mark.parametrize("granularity", [KERNEL, NM(1, 2), Block(2, 3), Block(16, 16)])
def test_patterns_on_transposed_convolutions(granularity: Any) -> None:
    # The same answer as for the plain convolution with the turned weight.
    graph = graph_of(Transposed(), torch.randn(1, 4, 5, 5))
    assert isinstance(fitted(granularity, graph, graph.kernels), Oriented)
    groups = {"one.weight": 1, "two.weight": 2, "three.weight": 8}
    scores = {name: torch.rand(tuple(kernels.shape)) for name, kernels in graph.kernels.items()}
    within = {name: torch.rand(score.shape) < 0.9 for name, score in scores.items()}
    budget = Budget(100, {name: score.numel() for name, score in scores.items()})
    found = select(scores, budget, within=within, granularity=fitted(granularity, graph, graph.kernels))
    plain = select(
        {name: swap_orientation(score, groups[name]) for name, score in scores.items()}, budget,
        within={name: swap_orientation(mask, groups[name]) for name, mask in within.items()},
        granularity=granularity,
    )  # fmt: skip
    assert is_subset(found, within)
    assert all(torch.equal(swap_orientation(found[name], groups[name]), plain[name]) for name in found)
    assert fitted(granularity, graph, graph.kernels).room(within).keys() == within.keys()


def test_nothing_changes_where_nothing_has_to() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3))
    assert fitted(WEIGHT, graph, graph.kernels) is WEIGHT
    assert fitted(KERNEL, graph, graph.kernels) is KERNEL
    channels = fitted(CHANNEL, graph, graph.kernels)
    assert isinstance(channels, ChannelGroups)
    assert fitted(channels, graph, graph.kernels) is channels


@pytest.mark.parametrize("name", ["channel", "head"])
def test_channels_keep_their_name_and_options(name: str) -> None:
    graph = graph_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(2, 3))
    channels = fitted(resolve(name), graph, graph.kernels)
    assert isinstance(channels, ChannelGroups)
    assert str(channels) == name
    assert channels.options.whole_heads == (name == "head")


def test_pool_is_for_channels_and_heads() -> None:
    assert resolve("channel", pool="max") == Channel(pool="max")
    assert resolve("head", pool="sum") == Channel(pool="sum", whole_heads=True)
    with pytest.raises(
        ValueError, match=r"pool='max': granularity 'weight' has none; 'channel' and 'head' do"
    ):
        resolve("weight", pool="max")
    with pytest.raises(ValueError, match=r"pool='median': expected one of 'mean', 'sum', 'l2', 'max'"):
        resolve("channel", pool="median")


def test_what_is_not_prunable_keeps_its_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    graph = graph_of(model, torch.ones(2, 3))
    channels = fitted(CHANNEL, graph, ["1.weight", "2.weight"])
    assert isinstance(channels, ChannelGroups)
    assert channels.groups.rows["0.weight"].tolist() == [-1] * 4
    assert channels.groups.rows["1.weight"].tolist() == [0, 1, 2, 3]
