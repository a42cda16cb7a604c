"""Tickets: parameters without masks get neutral values; a tied parameter is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.rewrite.files.tickets import kept_values, masked_parameters, neutralise


def test_biases_and_vectors_become_neutral_and_all_else_stays() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU(4), nn.Embedding(5, 2), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )
    fxprune.set_masks(
        net, {"0.weight": torch.rand(4, 3) < 0.5, "5.weight": torch.ones(2, 4, dtype=torch.bool)}
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(3)
        net[4].running_mean.fill_(2)
    before = {name: value.clone() for name, value in net.named_parameters()}
    neutralise(net)
    after = dict(net.named_parameters())
    ones, zeros = {"1.weight", "4.weight"}, {"0.bias", "1.bias", "4.bias", "5.bias"}
    for name, value in after.items():
        expected = before[name]
        if name in ones | zeros:
            expected = torch.full_like(value, float(name in ones))
        assert torch.equal(value, expected), name
    assert not net[4].running_mean.any()


def test_a_tied_parameter_is_listed_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    fxprune.set_masks(net, {"0.weight": torch.eye(3, dtype=torch.bool)})
    assert [name for name, _, _ in masked_parameters(net)] == ["0.weight"]


def test_values_are_read_under_the_mask_and_not_from_the_storage() -> None:
    weight, mask = torch.tensor([[1.0, -2.0], [3.0, -4.0]]), torch.tensor([[True, False], [False, True]])
    assert kept_values(weight, mask).tolist() == [[1.0, 0.0], [0.0, -4.0]]


def test_a_weight_that_is_computed_has_no_ticket(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 2))
    pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=torch.ones(1, 4), progress=False)
    with pytest.raises(ValueError, match=r"'0.weight' is computed .*; save with form='masks'"):
        fxprune.save(pruned, tmp_path / "t.safetensors", form="ticket")
    assert not any(tmp_path.iterdir())
    fxprune.save(pruned, tmp_path / "m.safetensors", form="masks")
    assert fxprune.load_masks(tmp_path / "m.safetensors").keys() == fxprune.masks(pruned).keys()
