"""Masks of parameters that the graph module itself owns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune


class Own(nn.Module):
    """The weight is the model's own, not that of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.linear(x, self.weight))
        return y


def test_the_state_of_a_graph_has_zeros_where_the_storage_was_changed() -> None:
    pruned = fxprune.apply(Own(), "random", 0.5, example_inputs=torch.ones(2, 3), progress=False)
    mask = fxprune.masks(pruned)["weight"]
    assert not bool(mask.all())
    with torch.no_grad():
        pruned.get_parameter("weight").fill_(7)
    assert torch.equal(pruned.state_dict()["weight"], 7.0 * mask)
