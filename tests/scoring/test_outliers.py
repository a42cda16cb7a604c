"""OWL's budget against its formula, written out for plain linear layers."""

from typing import Any

import pytest
import torch
from torch import nn

import fxprune


def net() -> nn.Sequential:
    """Layers of different sizes; a few weights of the second are far larger than the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    with torch.no_grad():
        model[2].weight[::4, ::3] *= 12
    return model


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
DATA = (X, torch.zeros(64))


def kept(model: nn.Module) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in fxprune.masks(model).items()}


def prune(model: nn.Module, method: str = "magnitude", **options: Any) -> nn.Module:
    return fxprune.apply(model, method, 0.6, **{"budget": "owl", "data": DATA, "progress": False, **options})


def by_hand(model: nn.Sequential, times: float = 5.0, spread: float = 0.08) -> dict[str, float]:
    shares, sizes, x = {}, {}, X
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            score = layer.weight.abs() * x.norm(dim=0)
            shares[f"{index}.weight"] = float((score > times * score.mean()).float().mean())
            sizes[f"{index}.weight"] = layer.weight.numel()
        x = layer(x)
    low, high = min(shares.values()), max(shares.values())
    assert high > low
    offset = {name: 2 * spread * (share - low) / (high - low) for name, share in shares.items()}
    mean = sum(offset[name] * sizes[name] for name in sizes) / sum(sizes.values())
    return {name: (0.4 + offset[name] - mean) * sizes[name] for name in sizes}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "random"])
def test_layers_keep_what_the_formula_says(method: str) -> None:
    model = net()
    with torch.no_grad():
        wanted = by_hand(model)
    found = kept(prune(model, method))
    assert sum(found.values()) == round(0.4 * sum(p.numel() for p in model.parameters() if p.dim() > 1))
    assert all(abs(found[name] - wanted[name]) < 1 for name in wanted)


def test_equal_layers_keep_equal_shares() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(layer, nn.Identity(), nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        layer.weight.copy_(torch.ones(16, 16))
        model[2].weight.copy_(torch.ones(16, 16))
    found = kept(fxprune.apply(model, "random", 0.5, budget="owl", data=DATA, progress=False))
    assert set(found.values()) == {128}


def test_it_needs_data_that_can_be_read_twice() -> None:
    with pytest.raises(ValueError, match=r"budget='owl': .* needs data="):
        prune(net(), data=None, example_inputs=X)
    with pytest.raises(ValueError, match="not an iterator"):
        prune(net(), data=iter([DATA]), example_inputs=X)
