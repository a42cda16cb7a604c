"""Weights that code computes from parameters: cut where what is left gives the same weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import assert_compacts, redrawn


class Classifier(nn.Module):
    """Cosines of features with the vectors of classes, or another function of a weight."""

    def __init__(self, weight: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12))
        self.classes, self.weight = nn.Parameter(torch.randn(5, 12)), weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.body(x)), self.weight(self.classes))


def lengths(weight: Tensor) -> Tensor:
    return weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-6)


@pytest.mark.parametrize("weight", [F.normalize, lengths, torch.tanh])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_zeros_of_the_parameter_are_zeros_of_the_weight(
    weight: Callable[[Tensor], Tensor], share: float
) -> None:
    small = assert_compacts(redrawn(Classifier(weight)), torch.randn(4, 6), share)
    assert small.get_parameter("classes").shape[1] < 12


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def over_columns(weight: Tensor) -> Tensor:
    return weight / (weight.abs().mean(1, keepdim=True) + 1e-6)


def softened(weight: Tensor) -> Tensor:
    return F.softplus(weight)


@pytest.mark.parametrize("weight", [standardised, over_columns, softened])
def test_a_weight_that_would_be_another_stays_whole(weight: Callable[[Tensor], Tensor]) -> None:
    model, x = redrawn(Classifier(weight)), torch.randn(4, 6)
    with torch.no_grad():
        model.get_parameter("classes")[:, :4] = 0
        for name in ("2.weight", "2.bias", "3.weight", "3.bias"):
            model.get_parameter(f"body.{name}")[:4] = 0
    small = fxprune.compact(model, x)
    assert small.get_parameter("classes").shape == (5, 12)
    table = small.meta["fxprune"]["compaction"]
    assert "classes: the layer computes its weight from all of it" in str(table)
    new = torch.randn(3, 6)
    assert torch.allclose(small(new), model(new), atol=1e-5)
