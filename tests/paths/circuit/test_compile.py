"""Networks that have a circuit, and those that have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowering.agreement import lowered
from torch import Tensor, nn

from fxprune.paths.circuit.compile import circuit


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(width, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x)))
        return y


@pytest.mark.parametrize(
    ("function", "width", "has_one"),
    [
        (torch.relu, 4, True),
        (lambda y: y.mean(-1, keepdim=True), 1, True),
        (lambda y: y.amax(-1, keepdim=True), 1, False),
    ],
)
def test_a_maximum_over_channels_is_no_linear_map(
    function: Callable[[Tensor], Tensor], width: int, has_one: bool
) -> None:
    found = circuit(lowered(Between(function, width), torch.ones(2, 3)))
    assert (found is not None) == has_one


def test_uneven_transposed_convolutions_have_no_circuit() -> None:
    stride = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(3, 2, 3, stride=2))
    assert circuit(lowered(stride, torch.ones(1, 2, 4, 4))) is None
    even = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(3, 2, 3, padding=1))
    assert circuit(lowered(even, torch.ones(1, 2, 4, 4))) is not None


def test_a_geometric_mean_of_two_factors_is_not_linear() -> None:
    graph = lowered(Between(lambda y: y * y.flip(-1), 4), torch.ones(2, 3))
    assert circuit(graph, products="each") is not None
    assert circuit(graph, products="mean") is None
