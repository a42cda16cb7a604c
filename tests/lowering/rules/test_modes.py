"""Switches between training and evaluation: paths are those of evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune
from fxprune.paths.count import reach


class Choice(nn.Module):
    def __init__(self, number: float | None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.first(x), self.second(x)
        if self.number is None:
            return self.last(y if self.training else z)
        return self.last(z + (y if self.training else self.number))


def test_the_value_of_training_is_noted_and_on_no_path() -> None:
    gm = fxprune.capture(Choice(None), torch.ones(3, 4))
    graph = fxprune.lower(gm)
    ((index, other),) = graph.in_training.items()
    (switch,) = (op for op in graph.ops if op.output.index == index)
    assert switch.inputs == (graph.value_of("second"),)
    assert other == graph.value_of("first")
    assert graph.in_both_modes(switch) == (*switch.inputs, other)
    effective = reach(graph, {"second.weight": torch.ones(6, 4, dtype=torch.bool)})
    assert {name: int(marks.sum()) for name, marks in effective.items()} == {
        "first.weight": 0,
        "second.weight": 6 * 4,
        "last.weight": 2 * 6,
    }


def test_a_number_of_evaluation_is_a_constant() -> None:
    graph = fxprune.lower(fxprune.capture(Choice(0.0), torch.ones(3, 4)))
    ((index, other),) = graph.in_training.items()
    assert other == graph.value_of("first")
    (value,) = (op.output for op in graph.ops if op.output.index == index)
    assert not value.live
    assert value.shape == (3, 6)


def test_a_network_of_one_mode_has_none() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Linear(6, 2))
    assert not fxprune.lower(fxprune.capture(net, torch.ones(3, 4))).in_training
