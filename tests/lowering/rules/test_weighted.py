"""Layers with weights: kernels, live taps, and paths against the oracle or plain operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.graph import KernelSet, Space
from fxprune.paths.count import flow, reach
from lowering.agreement import assert_reach, lowered
from lowering.wrapped import check


class Pair(nn.Module):
    """A bilinear layer between linear ones, or the same as products and a linear layer."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 5, bias=False)
        self.mix, self.after, self.plain = nn.Bilinear(3, 5, 4), nn.Linear(4, 2, bias=False), plain

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if not self.plain:
            return self.after(self.mix(a, b))
        pairs = torch.einsum("ni,nj->nij", a, b).flatten(1)
        return self.after(F.linear(pairs, self.mix.weight.flatten(1), self.mix.bias))


def test_a_bilinear_layer() -> None:
    torch.manual_seed(0)
    model, example = Pair(False), torch.randn(2, 4)
    graph = lowered(model, example)
    assert graph.kernels["mix.weight"].shape == (4, 3, 5)
    for seed, density in enumerate((0.6, 0.3)):
        masks = random_masks(model, density, seed, graph.kernels)
        assert_reach(graph, Pair(True), example, masks, periodic=False)


def one(layer: nn.Module, *shape: int) -> KernelSet:
    graph = lowered(nn.Sequential(layer), torch.ones(2, *shape))
    assert list(graph.kernels) == ["0.weight"]
    return graph.kernels["0.weight"]


def test_kernels_of_a_convolution() -> None:
    kernels = one(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 4, 8, 8)
    assert kernels.name == "0.weight"
    assert kernels.owner == "0"
    assert kernels.shape == (6, 2, 3, 3)
    assert (kernels.in_space.size, kernels.out_space.size) == (4, 6)
    assert kernels.out_space.name == "0"
    assert kernels.groups == 2
    assert kernels.macs == 4 * 4 * 6 * 2 * 9
    assert kernels.uses == 1
    assert kernels.out_axis == 0
    assert bool(kernels.live_taps.all())
    assert not kernels.transposed
    assert not kernels.direct


def test_kernels_of_a_transposed_convolution() -> None:
    """The parameter is (in, out / groups, *taps), and macs count the input's positions."""
    kernels = one(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 4, 5, 5)
    assert kernels.shape == (4, 3, 3, 3)
    assert (kernels.in_space.size, kernels.out_space.size) == (4, 6)
    assert kernels.transposed
    assert kernels.out_axis == 1
    assert kernels.macs == 5 * 5 * 4 * 3 * 9


def test_kernels_of_a_linear_layer() -> None:
    kernels = one(nn.Linear(3, 5), 7, 3)
    assert kernels.macs == 7 * 15
    assert kernels.in_space.size == 3
    assert kernels.out_space == Space("0", 5)
    assert kernels.live_taps.shape == ()


@pytest.mark.parametrize(
    ("layer", "size", "live"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), (1, 1), [[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
        (nn.Conv2d(1, 1, 3, padding=1), (1, 2), [[0, 0, 0], [1, 1, 1], [0, 0, 0]]),
        (nn.Conv2d(1, 1, 3, padding=1), (2, 2), [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        (nn.Conv2d(1, 1, 3, padding=1, stride=2), (2, 2), [[0, 0, 0], [0, 1, 1], [0, 1, 1]]),
        (nn.Conv2d(1, 1, 3, padding=3, dilation=3), (3, 3), [[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (2, 2), [[1, 1, 1]] * 3),
        (nn.ConvTranspose2d(1, 1, 3, padding=1), (1, 1), [[0, 0, 0], [0, 1, 0], [0, 0, 0]]),
    ],
)
def test_live_taps(layer: nn.Module, size: tuple[int, int], live: list[list[int]]) -> None:
    """Taps that only ever see padding are dead; on each layer reach and derivatives say so too."""
    graph = lowered(nn.Sequential(layer), torch.ones(2, 1, *size))
    expected = torch.tensor(live, dtype=torch.bool)
    assert torch.equal(graph.kernels["0.weight"].live_taps, expected)
    assert torch.equal(reach(graph, {})["0.weight"][0, 0], expected)
    gradient = flow(graph, {"0.weight": torch.ones(1, 1, 3, 3)}).gradients["0.weight"]
    assert torch.equal(gradient[0, 0] > 0, expected)


def test_padding_by_hand_is_padding() -> None:
    """Zeros put around the image by F.pad: taps that see only them are dead as well."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.pad(x, (1, 1, 1, 1)))

    taps = lowered(Same(), torch.ones(2, 1, 1, 1)).kernels["layer.weight"].live_taps
    assert int(taps.sum()) == 1
    assert bool(taps[1, 1])


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
        lambda: nn.Conv2d(4, 6, (3, 1), stride=2, padding=(2, 0), bias=False),
        lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False),
        lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1),
        lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect", bias=False),
        lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", bias=False),
        lambda: nn.Conv2d(4, 3, 3, padding=2, padding_mode="replicate", bias=False),
        lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, bias=False),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=1),
        lambda: nn.ConvTranspose2d(4, 4, 2, groups=4, stride=3, bias=False),
        lambda: nn.Conv2d(4, 3, 5, padding=4, stride=3, bias=False),
        lambda: nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(4, 3, 5, bias=False)),
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 3, 3, padding=1, dilation=2)),
        lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(4, 3, 3, stride=2)),
    ],
)
def test_convolutions(layer: Callable[[], nn.Module]) -> None:
    check(layer, (4, 4, 5))
