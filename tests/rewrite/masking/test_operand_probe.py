"""Follow pruned zeros on the way from a weight to the kernel that a layer computes with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.rewrite.masking.operand_probe import UnfollowableError, example_input, moves_zeros, private_twin

SHAPE = torch.Size((4, 6))


def test_scales_keep_zeros_and_standardisation_moves_them() -> None:
    assert not moves_zeros(lambda weight: 3 * weight, SHAPE)
    assert not moves_zeros(lambda weight: None, SHAPE)
    assert moves_zeros(lambda weight: weight - weight.mean(1, keepdim=True), SHAPE)


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_an_entry_that_is_more_about_another_weight_is_refused(factor: float) -> None:
    with pytest.raises(UnfollowableError):
        moves_zeros(lambda weight: weight + factor * weight.roll(1, 1), SHAPE)


def test_a_twin_of_a_module_without_values_has_ones() -> None:
    twin = private_twin(nn.BatchNorm1d(3, device="meta"), torch.float64)
    for name, tensor in twin.state_dict().items():
        assert bool((tensor == 1).all()), name


def test_an_input_of_a_convolution_is_longer_than_its_kernel_reaches() -> None:
    layer = nn.Conv2d(2, 3, (5, 1), dilation=(2, 1))
    (x,) = example_input(layer, layer.weight, margin=2)
    assert x.shape == (2, 2, 11, 3)
    assert layer(x).shape[2:] == (3, 3)


def test_small_filters_may_be_standardised() -> None:
    # With few weights in a filter one far from their mean moves all others more than itself.
    def standardised(weight: torch.Tensor) -> torch.Tensor:
        flat = weight.flatten(1)
        return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(weight)

    for shape in ((16, 4, 1, 1), (8, 3, 1, 1), (64, 16, 1, 1)):
        assert moves_zeros(standardised, torch.Size(shape))
