"""Sums, largest values and marks by channel, against loops over single weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from lowering.agreement import lowered
from torch import Tensor, nn

from fxprune.channels.by_channel import any_by_channel, largest_by_channel, sums_by_channel
from fxprune.channels.cost import count_weights
from fxprune.channels.groups import group_channels
from fxprune.graph import KernelSet

LAYERS = {
    "linear": lambda: (nn.Linear(6, 4), torch.ones(1, 6)),
    "wide": lambda: (nn.Linear(700, 400), torch.ones(1, 700)),  # several parts
    "conv": lambda: (nn.Conv2d(4, 6, 3), torch.ones(1, 4, 5, 5)),
    "grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.ones(1, 4, 5, 5)),
    "depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), torch.ones(1, 4, 5, 5)),
    "transposed": lambda: (nn.ConvTranspose2d(4, 6, 2), torch.ones(1, 4, 5, 5)),
    "transposed_grouped": lambda: (nn.ConvTranspose1d(4, 6, 2, groups=2), torch.ones(1, 4, 5)),
}


def drawn(kind: str) -> tuple[KernelSet, Tensor, Tensor]:
    torch.manual_seed(0)
    (kernels,) = lowered(*LAYERS[kind]()).kernels.values()
    return kernels, torch.randn(kernels.shape), torch.rand(kernels.shape) < 0.3


def channels(kernels: KernelSet, place: tuple[int, ...]) -> tuple[int, int]:
    """The output and the input channel of one weight, as torch documents the layouts."""
    first, second = place[:2]
    group = first // (kernels.shape[0] // kernels.groups)
    other = group * kernels.shape[1] + second
    return (other, first) if kernels.transposed else (first, other)


def by_hand(kernels: KernelSet, values: Tensor, mask: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """The values of the marked weights of every output and of every input channel."""
    rows: list[list[float]] = [[] for _ in range(kernels.out_space.size)]
    columns: list[list[float]] = [[] for _ in range(kernels.in_space.size)]
    for place in itertools.product(*map(range, kernels.shape)):
        if mask[place]:
            row, column = channels(kernels, place)
            rows[row].append(float(values[place]))
            columns[column].append(float(values[place]))
    return rows, columns


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "wide"])
def test_every_channel(kind: str) -> None:
    kernels, values, mask = drawn(kind)
    expected = by_hand(kernels, values, mask)
    for power in (1, 2):
        for got, lists in zip(sums_by_channel(values, kernels, mask, power), expected, strict=True):
            torch.testing.assert_close(got.tolist(), [sum((x**power for x in own), 0.0) for own in lists])
    largest = largest_by_channel(values, kernels, mask, -9.0)
    for got, lists in zip(largest, expected, strict=True):
        assert got.tolist() == [max(own, default=-9.0) for own in lists]
    for marks, lists in zip(any_by_channel(mask, kernels), expected, strict=True):
        assert marks.tolist() == [bool(own) for own in lists]


def test_large_parameters_are_added_up_in_parts() -> None:
    kernels, values, mask = drawn("wide")
    rows, columns = sums_by_channel(values, kernels, mask)
    marked = values.double() * mask
    torch.testing.assert_close(rows, marked.sum(1))
    torch.testing.assert_close(columns, marked.sum(0))


@pytest.mark.parametrize("kind", ["conv", "grouped", "linear", "transposed"])
@pytest.mark.parametrize("block", [True, False])
def test_weights_that_are_left_and_saved(kind: str, block: bool) -> None:
    """Masks that are a block of rows and columns, and others, before a layer of any kind."""
    torch.manual_seed(1)
    layer, x = LAYERS[kind]()
    first: nn.Module = nn.Conv2d(4, 4, 1) if x.dim() == 4 else nn.Linear(6, 6)
    graph = lowered(nn.Sequential(first, layer), x)
    groups = group_channels(graph)
    masks = {}
    for name, kernels in graph.kernels.items():
        mask = torch.rand(kernels.shape) < 0.5
        if block:
            mask = torch.ones(kernels.shape, dtype=torch.bool)
            mask[0], mask[:, 1] = False, False
        masks[name] = mask
    cost = count_weights(groups, masks)
    staying = torch.rand(groups.count) < 0.7

    def left(staying: Tensor) -> int:
        return sum(int((groups.kept(name, staying) & mask).sum()) for name, mask in masks.items())

    assert cost.left(staying) == left(staying)
    for group in range(groups.count):
        without = staying.clone()
        without[group] = False
        assert cost.saved(staying)[group] == left(staying) - left(without)
