"""Weights that are computed: what data meets is masked, trains, copies, saves, and is finalized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxprune

KINDS: dict[str, Callable[[Any], Any]] = {
    "weight_norm, old": nn.utils.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    change = KINDS[kind]
    return nn.Sequential(change(nn.Conv1d(4, 6, 3)), nn.ReLU(), nn.Flatten(), change(nn.Linear(24, 3)))


def met(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The weights that convolutions and linear maps are given in a forward."""
    seen: list[Tensor] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.conv1d, nn.functional.linear):
                seen.append(args[1].detach().clone())
            return func(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        model(x)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("returns", ["graph", "module"])
def test_what_data_meets_is_masked(kind: str, returns: Any) -> None:
    model, x = network(kind).eval(), torch.randn(2, 4, 6)
    dense, before = met(model, x), copy.deepcopy(model.state_dict())
    result = fxprune.apply(model, "magnitude", 0.6, example_inputs=x, returns=returns, on_collapse="warn")
    masks = fxprune.masks(result)
    assert set(masks) == {"0.weight", "3.weight"}
    for weight, whole, mask in zip(met(result, x), dense, masks.values(), strict=True):
        torch.testing.assert_close(weight, whole * mask)
    flat = torch.cat([weight.abs().flatten() for weight in dense])
    chosen = torch.cat([mask.flatten() for mask in masks.values()])
    assert flat[chosen].min() >= flat[~chosen].max()
    assert int(chosen.sum()) == round(0.4 * len(flat))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert fxprune.analyze(result, example_inputs=x).kept_params == int(chosen.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_masks_hold_in_training_copies_and_files(kind: str) -> None:
    x = torch.randn(2, 4, 6)
    result = fxprune.apply(network(kind), "random", 0.5, example_inputs=x)
    masks = fxprune.masks(result)
    trained = copy.deepcopy(result).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        optimizer.step()
    trained.eval()
    assert any(not torch.equal(a, b) for a, b in zip(met(trained, x), met(result.eval(), x), strict=True))
    fxprune.verify(trained)
    others = [pickle.loads(pickle.dumps(trained))] if "old" in kind else []
    result.load_state_dict(trained.state_dict())
    for model in (trained, result, *others):
        for weight, mask in zip(met(model, x), masks.values(), strict=True):
            assert not bool(weight[~mask].any())
    torch.testing.assert_close(result(x), trained(x))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_again_and_finalized(kind: str) -> None:
    x = torch.randn(2, 4, 6)
    once = fxprune.apply(network(kind).eval(), "random", 0.3, example_inputs=x)
    twice = fxprune.apply(once, "random", 0.6, example_inputs=x)
    first, second = fxprune.masks(once), fxprune.masks(twice)
    assert not any(bool((second[name] & ~first[name]).any()) for name in second)
    changed = {name: torch.ones_like(mask) for name, mask in first.items()}
    final = fxprune.finalize(twice)
    assert not fxprune.masks(final)
    assert [name for name, p in final.named_parameters() if p.dim() > 1] == ["0.weight", "3.weight"]
    torch.testing.assert_close(final(x), twice(x))
    fxprune.set_masks(twice, changed)
    assert all(bool(mask.all()) for mask in fxprune.masks(twice).values())


def test_a_mask_that_does_not_fit_a_computed_weight_is_refused() -> None:
    model = network("weight_norm")
    with pytest.raises(ValueError, match=r"masks\['0.weight'\] has shape \(2,\), the weight has \(6, 4, 3\)"):
        fxprune.set_masks(model, {"0.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(TypeError, match="expected a bool tensor"):
        fxprune.set_masks(model, {"0.weight": torch.ones(6, 4, 3)})
    assert fxprune.masks(model) == {}


def test_a_spectral_norm_takes_no_step_while_it_is_looked_at() -> None:
    model = network("spectral_norm").train()
    before = copy.deepcopy(model.state_dict())
    fxprune.apply(model, "random", 0.5, example_inputs=torch.randn(2, 4, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_recurrent_layer_whose_weights_are_computed() -> None:
    """Two of its matrices are computed by hooks: all four are pruned."""
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        nn.utils.weight_norm(layer, name)
    model, x = nn.Sequential(layer), torch.randn(2, 5, 3)
    result = fxprune.apply(model, "random", 0.5, example_inputs=x)
    masks = fxprune.masks(result)
    assert len(masks) == 4
    fxprune.verify(result)
    plain = nn.LSTM(3, 4, num_layers=2, batch_first=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(getattr(layer, name) * masks.get(f"0.{name}", torch.ones(())))
    torch.testing.assert_close(result(x)[0], plain(x)[0])
    torch.testing.assert_close(fxprune.finalize(result)(x)[0], result(x)[0])


class Pair(nn.Module):
    """A module of one's own with a plain and two computed weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("one", "two", "three"):
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))
        for name in ("one", "three"):
            parametrizations.spectral_norm(self, name)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.one @ self.two @ self.three


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_a_module_with_two_computed_weights_and_a_plain_one(returns: Any) -> None:
    torch.manual_seed(0)
    pair = Pair().eval()
    model, x = nn.Sequential(pair), torch.randn(2, 4)
    result = fxprune.apply(model, "random", 0.5, example_inputs=x, returns=returns)
    masks = fxprune.masks(result)
    assert set(masks) == {"0.one", "0.two", "0.three"}
    want = x
    for name in ("one", "two", "three"):
        want = want @ (getattr(pair, name) * masks[f"0.{name}"])
    torch.testing.assert_close(result(x), want)
    fxprune.verify(result)
    final = fxprune.finalize(result)
    torch.testing.assert_close(final(x), want)
    assert set(dict(final.named_parameters())) == {"0.one", "0.two", "0.three"}


def test_a_graph_cannot_compute_weights_of_the_model_itself() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="its own 'one' is computed by a parametrization; take returns='mod"):
        fxprune.apply(Pair(), "random", 0.5, example_inputs=x)
    result = fxprune.apply(Pair(), "random", 0.5, example_inputs=x, returns="module")
    assert set(fxprune.masks(result)) == {"one", "two", "three"}
