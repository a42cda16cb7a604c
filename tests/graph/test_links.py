"""Links between axes, written down by hand for one op each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.graph import ChannelGraph
from fxprune.graph.links import Link


class Applied(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def graph_of(function: Callable[..., Tensor] | nn.Module, *inputs: Tensor) -> ChannelGraph:
    model = function if isinstance(function, nn.Module) else Applied(function)
    return fxprune.lower(fxprune.capture(model.eval(), inputs))


def pairs(link: Link) -> tuple[Any, ...]:
    return (link.place, link.entries.tolist(), link.other, link.partners.tolist(), link.merged)


FUNCTIONS: dict[str, tuple[Any, list[tuple[int, ...]], list[tuple[Any, ...]]]] = {
    "a sum, broadcast": (
        lambda x, y: x + y, [(2, 3), (3,)],
        [((0, 0), [0, 1], (2, 0), [0, 1], False), ((0, 1), [0, 1, 2], (2, 1), [0, 1, 2], False),
         ((1, 0), [0, 1, 2], (2, 1), [0, 1, 2], False)],
    ),
    "a mean": (lambda x: x.mean(0), [(2, 3)], [((0, 1), [0, 1, 2], (1, 0), [0, 1, 2], False)]),
    "a product": (
        lambda x, y: x @ y, [(2, 3), (3, 4)],
        [((0, 0), [0, 1], (2, 0), [0, 1], False), ((0, 1), [0, 1, 2], (1, 0), [0, 1, 2], False),
         ((1, 1), [0, 1, 2, 3], (2, 1), [0, 1, 2, 3], False)],
    ),
    "turned around": (lambda x: x.flip(0), [(3,)], [((0, 0), [2, 1, 0], (1, 0), [0, 1, 2], False)]),
    "merged": (
        lambda x: x.flatten(), [(2, 3)],
        [((0, 0), [0, 0, 0, 1, 1, 1], (1, 0), [0, 1, 2, 3, 4, 5], True),
         ((0, 1), [0, 1, 2, 0, 1, 2], (1, 0), [0, 1, 2, 3, 4, 5], True)],
    ),
    "cut into heads": (
        lambda x: x.view(2, 3), [(6,)], [((0, 0), [0, 1, 2, 3, 4, 5], (1, 1), [0, 1, 2, 0, 1, 2], False)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str) -> None:
    """An axis is linked to itself, too, and a pair of axes both ways, which adds nothing."""
    function, shapes, expected = FUNCTIONS[name]
    links = [pairs(link) for link in graph_of(function, *map(torch.ones, shapes)).links()]
    found = [link for link in links if link[0] != link[2] and link[0] < link[2]]
    assert sorted(found) == sorted(expected)


def test_parameters_and_groups() -> None:
    """Four inputs and six outputs in two groups: the weight's second axis is read by both."""
    graph = graph_of(nn.Conv1d(4, 6, 1, groups=2), torch.ones(1, 4, 5))
    found = {(link.place, link.other): link for link in graph.links()}
    weight = found[(0, 1), ("weight", 1)]
    assert sorted(zip(weight.entries.tolist(), weight.partners.tolist(), strict=True)) == [
        (0, 0), (1, 1), (2, 0), (3, 1),
    ]  # fmt: skip
    assert found[(1, 1), ("weight", 0)].partners.tolist() == list(range(6))
    assert found[(0, 1), (0, 1)].partners.tolist() == [0, 1, 0, 1]
    assert found[(1, 1), (1, 1)].partners.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_filter_for_one_channel_goes_with_it() -> None:
    graph = graph_of(nn.Conv1d(3, 6, 1, groups=3), torch.ones(1, 3, 5))
    found = {(link.place, link.other): link for link in graph.links()}
    assert found[(0, 1), (1, 1)].entries.tolist() == [0, 0, 1, 1, 2, 2]
