"""Models that ``torch.nn.utils.prune`` has pruned: their masks count, and they become smaller."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxprune

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def pruned() -> nn.Module:
    model = net()
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    prune.ln_structured(model[3], "weight", 0.25, n=2, dim=1)
    prune.ln_structured(model[3], "weight", 0.25, n=2, dim=0)  # two of them on one weight
    prune.l1_unstructured(model[7], "weight", 0.5)
    return model


def test_masks_are_those_of_the_buffers() -> None:
    model = pruned()
    masks = fxprune.masks(model)
    assert list(masks) == ["0.weight", "3.weight", "7.weight"]
    for name, mask in masks.items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert torch.equal(mask, module.weight_mask.bool())


def test_finalize_is_what_remove_makes() -> None:
    model = pruned()
    state = copy.deepcopy(model.state_dict())
    final = fxprune.finalize(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    for index in (0, 3, 7):
        prune.remove(model[index], "weight")
    assert set(final.state_dict()) == set(net().state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in final.state_dict().items())
    assert torch.equal(final(X), model(X))
    assert not final[0]._forward_pre_hooks


def test_it_becomes_smaller_and_is_saved(tmp_path: Path) -> None:
    model = pruned()
    small = fxprune.compact(model, X)
    assert torch.allclose(small(X), model(X), atol=1e-6)
    assert len(small.get_submodule("0").weight) <= 8
    assert len(small.get_submodule("3").weight) <= 6
    fxprune.save(small, tmp_path / "small.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "small.safetensors", net())(X), small(X))


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_apply_prunes_on_from_there(returns: Any) -> None:
    model = pruned()
    before = fxprune.masks(model)
    result = fxprune.apply(model, "magnitude", 0.8, example_inputs=X, returns=returns)
    after = fxprune.masks(result)
    assert fxprune.analyze(result, example_inputs=X).sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(bool((before[name] | ~mask).all()) for name, mask in after.items())
    pruner = fxprune.Pruner(model, "gmp", 0.8, total=1, example_inputs=X, returns=returns)
    assert pruner.sparsity == pytest.approx(1 - sum(int(mask.sum()) for mask in before.values()) / 1616)
    assert prune.is_pruned(model)
    assert "weight_orig" in dict(model[0].named_parameters())


def test_in_place_says_what_to_do_first() -> None:
    with pytest.raises(ValueError, match=r"model: torch.nn.utils.prune has pruned '0.weight'.*prune.remove"):
        fxprune.apply(pruned(), "magnitude", 0.8, example_inputs=X, returns="inplace")
