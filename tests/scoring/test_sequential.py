"""Layers that are solved one after another: parameters in any layout."""

import copy
from typing import Any

import pytest
import torch
from methods.problems import problem
from torch import nn

import fxprune
from fxprune import methods


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3),
    ).double().eval()  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("granularity", ["weight", "kernel", "nm(2,4)"])
@pytest.mark.parametrize("method", ["sparsegpt", "alps", "obc"])
def test_weights_that_lie_channels_last_are_solved_as_contiguous_ones(method: str, granularity: str) -> None:
    x = torch.randn(60, 4, 5, 5).double()
    found: list[Any] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network().to(memory_format=layout)
        fields: dict[str, Any] = {
            "data": (x, torch.zeros(60)),
            "granularity": fxprune.sparsity.granularity.resolve(granularity),
        }
        found.append(methods.get(method).find(problem(model, 0.5, **fields)))
        for name, values in found[-1][1].items():
            assert values.stride() == model.get_parameter(name).stride()
    (masks, weights), (other_masks, other_weights) = found
    for name, mask in masks.items():
        assert torch.equal(other_masks[name], mask)
        assert torch.allclose(other_weights[name] * mask, weights[name] * mask)


def test_weights_that_lie_channels_last_are_reconstructed_as_contiguous_ones() -> None:
    x, dense = torch.randn(60, 4, 5, 5).double(), network()
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(dense).to(memory_format=layout)
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
        fitted = fxprune.reconstruct(pruned, (x, torch.zeros(60)), model, progress=False)
        found.append({name: fitted.get_parameter(name) for name in fxprune.masks(pruned)})
    assert all(torch.allclose(found[1][name], values) for name, values in found[0].items())
