"""Lengths and spreads: scales where a norm divides by them, numbers of their own elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach

Work = Callable[[Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.first, self.second, self.work = nn.Linear(4, 6), nn.Linear(6, 6), work

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.work(self.second(torch.relu(self.first(x))))
        return result


OUTPUTS: dict[str, Work] = {
    "length": lambda h: h.norm(dim=-1),
    "length of order one": lambda h: torch.linalg.vector_norm(h, 1, -1, True),
    "spread": lambda h: h.std(1),
    "spread of all": lambda h: h.var(),
    "statistics side by side": lambda h: torch.cat([h.mean(1), h.std(1)], -1),
    "length by a number": lambda h: torch.norm(h, dim=-1) * 2 + 1,
}
SCALES: dict[str, Work] = {
    "divided": lambda h: h / (h.norm(dim=-1, keepdim=True) + 1e-6),
    "standardized": lambda h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True).clamp(min=1e-5),
    "by its inverse": lambda h: h * (h.var(-1, keepdim=True) + 1e-5).rsqrt(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_lengths_that_go_on_as_numbers_are_on_paths(name: str) -> None:
    torch.manual_seed(0)
    graph = lower(capture(Net(OUTPUTS[name]), torch.randn(2, 5, 4)), strict=True)
    assert not graph.opaque
    assert all(bool(mask.all()) for mask in reach(graph, {}).values())


@pytest.mark.parametrize("name", SCALES)
def test_lengths_that_norms_divide_by_are_on_none(name: str) -> None:
    torch.manual_seed(0)
    graph = lower(capture(Net(SCALES[name]), torch.randn(2, 5, 4)), strict=True)
    masks = {"first.weight": torch.ones(6, 4), "second.weight": torch.ones(6, 6)}
    masks["second.weight"][1:] = 0
    found = reach(graph, masks)["second.weight"]
    assert bool(found[0].all())
    assert not bool(found[1:].any())


@pytest.mark.parametrize("name", ["length", "spread"])
def test_networks_that_give_lengths_get_smaller(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    pruned = fxprune.apply(
        Net(OUTPUTS[name]), "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False
    ).eval()
    small = fxprune.compact(pruned)
    torch.testing.assert_close(small(x), pruned(x))
    assert small.get_parameter("first.weight").shape[0] < 6
