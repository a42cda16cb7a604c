"""Layers that no graph shows are pruned while a network trains, as before it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

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
    pruner = made(model, method, returns=returns)
    train(pruner)
    path = "" if kind == "part" else "model.inner." if returns == "graph" else "inner."
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


@pytest.mark.filterwarnings("ignore:100% of")
def test_a_criterion_that_asks_for_paths_leaves_them_out() -> None:
    with pytest.warns(UserWarning, match=r"cannot be pruned.*1\.layer\.weight \(64\)"):
        pruner = made(with_a_part(), criterion="synflow")
    assert set(pruner.masks) == {"0.weight", "2.weight"}
    with pytest.raises(CaptureError, match="method 'gmp' asks about paths"):
        made(Whole(), criterion="synflow", returns="module")


def with_computed() -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older form is what is tested
        older = nn.utils.weight_norm(nn.Linear(12, 12))
    return nn.Sequential(
        weight_norm(nn.Linear(4, 12)), nn.ReLU(), older, nn.ReLU(),
        spectral_norm(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 2),
    )  # fmt: skip


def train_once(pruner: fxprune.Pruner, optimizer: torch.optim.Optimizer) -> None:
    pruner.model.train()
    optimizer.zero_grad()
    (pruner.model(X) - X[:, :2]).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("returns", ["graph", "module", "inplace"])
def test_computed_weights_are_pruned_while_the_network_trains(returns: Any) -> None:
    pruner = fxprune.Pruner(with_computed(), "gmp", 0.5, total=3, example_inputs=X, returns=returns)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.01, momentum=0.9)
    for at in range(1, 4):
        train_once(pruner, optimizer)
        pruner.step(at)
    train_once(pruner, optimizer)
    assert pruner.masks.keys() == {"0.weight", "2.weight", "4.weight", "6.weight"}
    assert pruner.sparsity == 0.5
    fxprune.verify(pruner.model)
    # Independent: a plain network of the weights that the finalized one has.
    plain = nn.Sequential(
        nn.Linear(4, 12),
        nn.ReLU(),
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 2),
    )
    state = fxprune.finalize(pruner.model).state_dict()
    plain.load_state_dict(state)
    for name, mask in pruner.masks.items():
        assert not state[name][~mask].any()
        assert state[name][mask].all()
    torch.testing.assert_close(pruner.model.eval()(X), plain(X))


def test_magnitudes_are_those_of_the_computed_weights_of_the_moment() -> None:
    pruner = fxprune.Pruner(with_computed(), "gmp", 0.5, total=1, example_inputs=X, returns="module")
    train_once(pruner, torch.optim.SGD(pruner.model.parameters(), 0.05))
    with torch.no_grad():
        sizes = {n: pruner.model.eval().get_submodule(n[0]).weight.abs().clone() for n in pruner.masks}
    pruner.step(1)
    cut = torch.cat([size.flatten() for size in sizes.values()]).median()
    assert all(torch.equal(mask, sizes[name] > cut) for name, mask in pruner.masks.items())


def test_a_smaller_network_has_plain_weights_that_its_optimizer_trains() -> None:
    pruner = fxprune.Pruner(
        with_computed(), "gmp", 0.5, total=2, example_inputs=X, granularity="channel", of="macs"
    )
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.05, momentum=0.9)
    train_once(pruner, optimizer)
    pruner.step(1)
    before = pruner.model.eval()(X)
    small = pruner.compact(optimizer).eval()
    torch.testing.assert_close(small(X), before)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in small.parameters()}
    train_once(pruner, optimizer)
    pruner.step(2)
    fxprune.verify(pruner.model)


def test_a_killed_run_with_computed_weights_goes_on(tmp_path: Path) -> None:
    def run(folder: str, until: int) -> fxprune.Pruner:
        pruner = fxprune.Pruner(with_computed(), "gmp", 0.6, total=4, example_inputs=X, granularity="channel",
                                checkpoint_dir=tmp_path / folder)  # fmt: skip
        optimizer = torch.optim.SGD(pruner.model.parameters(), 0.05, momentum=0.9)
        for at in range(pruner.resume(optimizer=optimizer) + 1, until + 1):
            train_once(pruner, optimizer)
            if at == 2:
                pruner.compact()
            pruner.step(at)
        return pruner

    whole = run("whole", 4).model.state_dict()
    run("killed", 3)
    again = run("killed", 4).model.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_rewound_weights_keep_the_masks_of_computed_ones() -> None:
    pruner = fxprune.Pruner(with_computed(), "gmp", 0.5, total=1, example_inputs=X)
    start = {name: value.detach().clone() for name, value in pruner.model.named_parameters()}
    train_once(pruner, torch.optim.SGD(pruner.model.parameters(), 0.05))
    pruner.step(1)
    masks = pruner.masks
    pruner.reinitialize("original")
    assert pruner.sparsity == 0.5
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    for name, value in pruner.model.named_parameters():
        assert torch.equal(value, start[name] * masks[name] if name in masks else start[name])
    with pytest.raises(ValueError, match=r"model: its weight '.*weight' is computed"):
        pruner.reinitialize("centroids")


def test_methods_whose_weights_come_back_leave_computed_ones_dense_and_name_them() -> None:
    with pytest.warns(UserWarning, match="93% of the .* cannot be pruned.*2.weight_v"):
        pruner = fxprune.Pruner(with_computed(), "set", 0.5, total=2, example_inputs=X)
    assert pruner.masks.keys() == {"6.weight"}
