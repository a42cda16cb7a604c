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


def test_what_is_zero_goes_whatever_weight_reads_it() -> None:
    """The parameter's zeros are none of the weight, and what they meet is zero."""
    model, x = redrawn(Classifier(softened)), torch.randn(4, 6)
    with torch.no_grad():
        for name in ("classes", "body.2.weight", "body.2.bias", "body.3.weight", "body.3.bias"):
            parameter = model.get_parameter(name)
            (parameter.T if name == "classes" else parameter)[:4] = 0
        model.get_parameter("body.3.bias")[3] = 0.5
    small = fxprune.compact(model, x, verify=False)
    assert small.get_parameter("classes").shape == (5, 9)
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("weight", [standardised, over_columns])
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


class Standardised(nn.Conv2d):
    """A convolution whose rows have mean zero."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class OfLengthOne(nn.Conv2d):
    """A convolution whose rows have length one."""

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.normalize(self.weight.flatten(1), dim=1).view_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def of_own_layers(layer: type[nn.Conv2d]) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    net = nn.Sequential(layer(3, 8, 3), nn.ReLU(), layer(8, 12, 3, padding=1), nn.ReLU(), head)
    return redrawn(net)


@pytest.mark.parametrize("layer", [Standardised, OfLengthOne])
def test_outputs_of_layers_with_code_of_their_own_go(layer: type[nn.Conv2d]) -> None:
    """The weight that their code computes has the same rows without them."""
    net, x = of_own_layers(layer), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net.get_parameter("4.2.weight")[:, [2, 5]] = 0.0
    small = fxprune.compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert small.get_parameter("2.weight").shape == (10, 8, 3, 3)
    assert small.meta["fxprune"]["compaction"].given_back == 0


def test_inputs_that_a_layer_of_its_own_counts_stay() -> None:
    net, x = of_own_layers(Standardised), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net.get_parameter("0.weight")[1], net.get_parameter("0.bias")[1] = 0.0, 0.0
    small = fxprune.compact(net, x, verify=False)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("0.weight")) == 8


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_channels_of_layers_of_length_one_go_with_all_that_belongs_to_them(share: float) -> None:
    assert_compacts(of_own_layers(OfLengthOne), torch.randn(2, 3, 8, 8), share)
