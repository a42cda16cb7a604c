"""Granularities on a graph: transposed parameters, and channels that are tied."""

from typing import Any

import pytest
import torch
from nets import NETS
from torch import nn

from fxprune.capture import capture
from fxprune.channels.groups import channel_groups
from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.sparsity.budget import Budget, plan
from fxprune.sparsity.channel_granularity import Channels, Oriented, fitted
from fxprune.sparsity.granularity import CHANNEL, KERNEL, NM, WEIGHT, Block
from fxprune.sparsity.masks import Masks, is_subset, total
from fxprune.sparsity.select import select


def graph_of(model: nn.Module, inputs: Any) -> ChannelGraph:
    return lower(capture(model, inputs))


def groups_of(net: str) -> dict[str, list[int]]:
    """Group numbers by parameter, counted from 0 in the order in which they first occur."""
    torch.manual_seed(0)
    found = channel_groups(graph_of(*NETS[net]()))
    order = {
        number: place for place, number in enumerate(dict.fromkeys(torch.cat(list(found.values())).tolist()))
    }
    return {name: [order[number] for number in numbers.tolist()] for name, numbers in found.items()}


@pytest.mark.parametrize(
    ("net", "same"),
    [
        ("residual", [("0.weight", "1.body.weight")]),
        ("projection", [("project.weight", "body.2.weight")]),
        ("depthwise", [("0.weight", "1.weight")]),
        ("excite_sigmoid", [("first.weight", "expand.weight")]),
        ("glu", [("left.weight", "right.weight")]),
        ("vit", [("embed.weight", "attention.proj.weight"), ("embed.weight", "mlp.3.weight")]),
        ("mixer", [("embed.weight", "channels.2.weight")]),
        ("two_inputs", [("image.weight", "vector.weight")]),
    ],
)
def test_channels_that_meet_are_tied(net: str, same: list[tuple[str, str]]) -> None:
    groups = groups_of(net)
    assert all(groups[left] == groups[right] for left, right in same)
    tied = {name for pair in same for name in pair}
    for name, numbers in groups.items():
        if name not in tied and not any(part in name for part in ("qkv", "wide")):
            others = [number for other, list_ in groups.items() if other != name for number in list_]
            assert not set(numbers) & set(others), f"{name} is tied to something"
            assert len(set(numbers)) == len(numbers)


def test_chains_are_not_tied() -> None:
    for net in ("mlp", "conv_chain", "dense", "flatten", "adaptive_pool", "grouped"):
        numbers = [number for own in groups_of(net).values() for number in own]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    "net", ["multihead", "attention", "attention_sdpa", "attention_einsum", "vit", "cross_attention"]
)
def test_a_head_of_attention_is_one_group(net: str) -> None:
    parts = {name: own for name, own in groups_of(net).items() if "qkv" in name or "_proj_weight" in name}
    numbers = [number for own in parts.values() for number in own]
    first, second = numbers[0], numbers[4]
    assert first != second
    assert numbers == [first] * 4 + [second] * 4 + [first] * 4 + [second] * 4 + [first] * 4 + [second] * 4


def test_halves_of_a_gated_unit_and_shuffled_channels() -> None:
    wide = groups_of("glu")["wide.weight"]
    assert wide[:6] == wide[6:] == list(range(6))
    shuffled = groups_of("shuffle")
    assert shuffled["depth.weight"] == [0, 4, 1, 5, 2, 6, 3, 7]


class Transposed(nn.Module):
    """Transposed convolutions, the second in two groups, the last depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ConvTranspose2d(4, 6, 2)
        self.two = nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.three = nn.ConvTranspose2d(8, 8, 2, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x)))


def outputs_left(model: Transposed, masks: Masks, layer: str) -> list[bool]:
    """Which output channels of a transposed convolution are not zero, run as it is."""
    module: nn.ConvTranspose2d = getattr(model, layer)
    inputs = torch.ones(1, module.in_channels, 3, 3)
    weight = masks[f"{layer}.weight"].float()
    out = nn.functional.conv_transpose2d(inputs, weight, groups=module.groups)
    return [bool(channel.any()) for channel in out[0]]


def test_channels_of_transposed_convolutions_are_outputs() -> None:
    model = Transposed()
    graph = graph_of(model, torch.randn(1, 4, 5, 5))
    shapes = {name: tuple(kernels.shape) for name, kernels in graph.kernels.items()}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    granularity = fitted(CHANNEL, graph)
    for sparsity in (0.3, 0.6, 0.8):
        masks = select(scores, plan("global", sparsity, shapes), granularity=granularity)
        left = {layer: outputs_left(model, masks, layer) for layer in ("one", "two", "three")}
        assert left["two"] == left["three"], "a depthwise channel goes with its input"
        for layer, size in (("one", 16), ("two", 27), ("three", 4)):
            assert int(masks[f"{layer}.weight"].sum()) == size * sum(left[layer])
        # The groups that are kept have the largest sums.
        sums = {
            layer: swap_orientation(scores[f"{layer}.weight"], getattr(model, layer).groups).flatten(1).sum(1)
            for layer in left
        }
        pairs = (sums["two"] + sums["three"]).tolist()
        kept = [pairs[i] for i in range(8) if left["two"][i]]
        gone = [pairs[i] for i in range(8) if not left["two"][i]]
        assert not kept or not gone or min(kept) > max(gone)


@pytest.mark.parametrize("granularity", [KERNEL, NM(1, 2), Block(2, 3), Block(16, 16)])
def test_patterns_on_transposed_convolutions(granularity: Any) -> None:
    # The same answer as for the plain convolution with the turned weight.
    graph = graph_of(Transposed(), torch.randn(1, 4, 5, 5))
    assert isinstance(fitted(granularity, graph), Oriented)
    groups = {"one.weight": 1, "two.weight": 2, "three.weight": 8}
    scores = {name: torch.rand(tuple(kernels.shape)) for name, kernels in graph.kernels.items()}
    within = {name: torch.rand(score.shape) < 0.9 for name, score in scores.items()}
    budget = Budget(100, {name: score.numel() for name, score in scores.items()})
    found = select(scores, budget, within=within, granularity=fitted(granularity, graph))
    plain = select(
        {name: swap_orientation(score, groups[name]) for name, score in scores.items()}, budget,
        within={name: swap_orientation(mask, groups[name]) for name, mask in within.items()},
        granularity=granularity,
    )  # fmt: skip
    assert is_subset(found, within)
    assert all(torch.equal(swap_orientation(found[name], groups[name]), plain[name]) for name in found)
    assert fitted(granularity, graph).room(within).keys() == within.keys()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_turning_is_its_own_inverse_and_says_what_pytorch_does(groups: int) -> None:
    weight = torch.rand(4, 3, 3, 3)
    assert torch.equal(swap_orientation(swap_orientation(weight, groups), groups), weight)
    x = torch.rand(2, 4, 5, 5)
    out = nn.functional.conv_transpose2d(x, weight, groups=groups)
    plain = nn.functional.conv2d(
        nn.functional.pad(x, (2, 2, 2, 2)), swap_orientation(weight, groups).flip(2, 3), groups=groups
    )
    assert torch.allclose(out, plain, atol=1e-5)


def test_tied_channels_share_one_score_and_one_fate() -> None:
    torch.manual_seed(0)
    graph = graph_of(*NETS["residual"]())
    shapes = {name: tuple(kernels.shape) for name, kernels in graph.kernels.items()}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    granularity = fitted(CHANNEL, graph)
    masks = select(scores, plan("global", 0.5, shapes), granularity=granularity)
    first, second = (masks[name].flatten(1).any(1) for name in ("0.weight", "1.body.weight"))
    assert torch.equal(first, second)
    together = scores["0.weight"].flatten(1).sum(1) + scores["1.body.weight"].flatten(1).sum(1)
    assert first.any()
    assert not first.all()
    assert together[first].min() > together[~first].max()
    assert total(masks) <= plan("global", 0.5, shapes).total
    with pytest.raises(ValueError, match="are pruned together: use budget='global'"):
        select(scores, plan("uniform", 0.5, shapes), granularity=granularity)


def test_chains_of_channels_are_the_slices_they_were() -> None:
    torch.manual_seed(0)
    graph = graph_of(*NETS["conv_chain"]())
    shapes = {name: tuple(kernels.shape) for name, kernels in graph.kernels.items()}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    for budget in (plan("global", 0.6, shapes), plan("erk", 0.4, shapes)):
        found = select(scores, budget, granularity=fitted(CHANNEL, graph))
        plain = select(scores, budget, granularity=CHANNEL)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_nothing_changes_where_nothing_has_to() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3))
    assert fitted(WEIGHT, graph) is WEIGHT
    assert fitted(KERNEL, graph) is KERNEL
    channels = fitted(CHANNEL, graph)
    assert isinstance(channels, Channels)
    assert fitted(channels, graph) is channels
    assert str(channels) == "channel"
