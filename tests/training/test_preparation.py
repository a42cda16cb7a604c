"""Layers that no graph shows are pruned while a network trains, as before it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture import CaptureError

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


class Asking(nn.Module):
    """Asks for numbers, so that it stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x)).relu()
        return -x if float(x.detach().sum()) > 1e9 else x


def with_a_part() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Asking(), nn.Linear(8, 2))


class Whole(nn.Module):
    """Asks for numbers itself, so that there is no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = with_a_part()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return -y if float(y.detach().sum()) > 1e9 else y


def made(model: nn.Module, method: str = "gmp", **options: Any) -> fxprune.Pruner:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "capture: |.*pruned without a graph", UserWarning)
        return fxprune.Pruner(model, method, 0.5, total=3, example_inputs=X, **options)


def train(pruner: fxprune.Pruner) -> None:
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1, momentum=0.9)
    for step in range(1, 4):
        optimizer.zero_grad()
        pruner.model(X).square().mean().backward()
        optimizer.step()
        pruner.step(step, loss=lambda: pruner.model(X).square().mean())


@pytest.mark.parametrize("returns", ["graph", "module", "inplace"])
@pytest.mark.parametrize("method", ["gmp", "imp", "set", "rigl"])
@pytest.mark.parametrize("kind", ["part", "whole"])
def test_layers_that_no_graph_shows_are_pruned(kind: str, method: str, returns: str) -> None:
    model = with_a_part() if kind == "part" else Whole()
    if kind == "whole" and returns == "graph":
        with pytest.raises(CaptureError, match="or returns='module'"):
            made(model, method, returns=returns)
        return
    pruner = made(model, method, returns=returns)
    train(pruner)
    path = "" if kind == "part" else "inner."
    assert set(pruner.masks) == {f"{path}{name}.weight" for name in ("0", "1.layer", "2")}
    assert pruner.sparsity == 0.5
    assert not bool(pruner.masks[f"{path}1.layer.weight"].all())
    for name, mask in pruner.masks.items():
        assert not bool(pruner.model.get_parameter(name)[~mask].any())
    plain = fxprune.finalize(pruner.model)
    assert torch.allclose(plain.eval()(X), pruner.model.eval()(X), atol=1e-6)


def test_masks_are_those_of_apply() -> None:
    pruner = made(with_a_part())
    pruner.step(3)
    with pytest.warns(UserWarning, match="kept whole"):
        found = fxprune.apply(with_a_part(), "magnitude", 0.5, example_inputs=X)
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in fxprune.masks(found).items())


def test_a_criterion_that_asks_for_paths_leaves_them_out() -> None:
    with pytest.warns(UserWarning, match=r"cannot be pruned.*1\.layer\.weight \(64\)"):
        pruner = made(with_a_part(), criterion="synflow")
    assert set(pruner.masks) == {"0.weight", "2.weight"}
    with pytest.raises(CaptureError, match="method 'gmp' asks about paths"):
        made(Whole(), criterion="synflow", returns="module")
