"""Costs of networks without some of their groups, against networks that are really smaller."""

from math import prod
from typing import Any

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from channels.grouping import graph_of
from fxprune.channels.cost import Cost, count_macs, count_parameters, count_weights
from fxprune.channels.groups import Groups, group_channels


def counted_macs(model: nn.Module, inputs: Any) -> float:
    """The multiply-adds for one sample, as torch counts them while the model runs."""
    samples = len(next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch does not count what the fused kernels do
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(inputs, dict):
            model(**inputs)
        else:
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / 2 / samples


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


class Attention(nn.Module):
    """Attention with two heads of ``width`` channels, of which ``inner`` carry values."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.width, self.inner = width, inner
        self.q, self.k = nn.Linear(6, 2 * width), nn.Linear(6, 2 * width)
        self.v, self.out = nn.Linear(6, 2 * inner), nn.Linear(2 * inner, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k = (layer(x).view(batch, tokens, 2, self.width).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).view(batch, tokens, 2, self.inner).transpose(1, 2)
        y = scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 2 * self.inner))


class Bottleneck(nn.Module):
    """Pointwise, grouped or depthwise, transposed and pointwise convolutions of a given width."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.up = nn.ConvTranspose2d(width, 4, 2, stride=2, bias=False)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.two(self.norm(self.one(x)))))


class Mixer(nn.Module):
    """Features are mixed, then tokens: the second layer's use of a channel depends on the first's width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.features = nn.Linear(4, width)
        self.tokens, self.back = nn.Linear(5, hidden), nn.Linear(hidden, 5)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).transpose(1, 2)
        return self.last(self.back(torch.relu(self.tokens(y))).transpose(1, 2))


def without(groups: Groups, lost: dict[str, int]) -> Tensor:
    """All groups but the first ones of some layers, as many as ``lost`` says."""
    staying = torch.ones(groups.count, dtype=torch.bool)
    for name, number in lost.items():
        staying[torch.unique(groups.rows[f"{name}.weight"])[:number]] = False
    return staying


@pytest.mark.parametrize(
    ("whole", "lost", "small", "inputs"),
    [
        # A group of an attention is a channel of both heads.
        (Attention(4, 5), {"q": 1, "v": 3}, Attention(3, 2), torch.ones(2, 7, 6)),
        (Bottleneck(8, 1), {"one": 3}, None, torch.ones(2, 3, 5, 5)),
        (Bottleneck(8, 8), {"one": 3}, Bottleneck(5, 5), torch.ones(2, 3, 5, 5)),
        (Mixer(6, 9), {"features": 2, "tokens": 4}, Mixer(4, 5), torch.ones(2, 5, 4)),
    ],
)
def test_costs_are_those_of_the_smaller_network(
    whole: nn.Module, lost: dict[str, int], small: nn.Module | None, inputs: Tensor
) -> None:
    if small is None:  # only the middle convolution's input is narrower
        small = Bottleneck(8, 1)
        small.one, small.norm, small.two = (
            nn.Conv2d(3, 5, 1),
            nn.BatchNorm2d(5),
            nn.Conv2d(5, 8, 3, padding=1),
        )
    whole.eval(), small.eval()
    groups = group_channels(graph_of(whole, inputs))
    staying = without(groups, lost)
    macs, parameters = count_macs(groups), count_parameters(groups, shapes_of(whole))
    assert macs.whole == counted_macs(whole, inputs)
    assert macs.left(staying) == counted_macs(small, inputs)
    assert parameters.whole == sum(parameter.numel() for parameter in whole.parameters())
    assert parameters.left(staying) == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize("kind", one_in(2, sorted(NETS)))
def test_every_small_network_costs_what_it_does(kind: str) -> None:
    model, inputs = NETS[kind]()
    model.eval()
    graph = graph_of(model, inputs)
    groups = group_channels(graph)
    shapes = shapes_of(model)
    parameters = count_parameters(groups, shapes)
    assert parameters.whole == sum(map(prod, shapes.values()))
    expected = counted_macs(model, inputs)
    if graph.opaque:
        assert count_macs(groups).whole <= expected
    else:
        assert count_macs(groups).whole == pytest.approx(expected)


@pytest.mark.parametrize("kind", one_in(2, sorted(NETS)))
def test_saved_is_the_difference_that_one_group_makes(kind: str) -> None:
    model, inputs = NETS[kind]()
    graph = graph_of(model.eval(), inputs)
    groups = group_channels(graph)
    torch.manual_seed(0)
    masks = {name: torch.rand(tuple(kernels.shape)) < 0.7 for name, kernels in graph.kernels.items()}
    staying = torch.rand(groups.count) < 0.8
    for cost in (count_weights(groups, masks), count_parameters(groups, shapes_of(model))):
        assert torch.allclose(cost.saved(staying), one_by_one(cost, staying))
    weights = {name: groups.kept(name, staying) & mask for name, mask in masks.items()}
    assert count_weights(groups, masks).left(staying) == sum(int(mask.sum()) for mask in weights.values())


def one_by_one(cost: Cost, staying: Tensor) -> Tensor:
    saved = torch.zeros(len(staying), dtype=torch.float64)
    for group in staying.nonzero().flatten().tolist():
        fewer = staying.clone()
        fewer[group] = False
        saved[group] = cost.left(staying) - cost.left(fewer)
    return saved


class MadeKernel(nn.Module):
    """A convolution whose weights are made from the input: a product that no equation describes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.maker = nn.Conv2d(3, 4, 1), nn.Linear(3, 5 * 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(x.mean((0, 2, 3))).view(5, 4, 1, 1)
        return nn.functional.conv2d(self.first(x), weight)


def test_macs_of_the_whole_network_are_those_of_its_report() -> None:
    x = torch.ones(1, 3, 6, 6)
    graph = graph_of(MadeKernel(), x)
    whole = count_macs(group_channels(graph)).whole
    assert whole == counted_macs(MadeKernel(), x) == 36 * (3 * 4 + 4 * 5) + 3 * 20
