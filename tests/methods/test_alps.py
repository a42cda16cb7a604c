"""ALPS against the best mask of all, found by trying every one, and against other methods' errors."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import methods
from methods.problems import problem

DAMP = 0.01


def layer_and_inputs(inputs: int, outputs: int) -> tuple[nn.Sequential, Tensor]:
    x = torch.randn(40, inputs).double() @ torch.randn(inputs, inputs).double()
    return nn.Sequential(nn.Linear(inputs, outputs)).double(), x


def solve(model: nn.Module, x: Tensor, sparsity: float, name: str = "alps", **options: Any) -> Any:
    return methods.get(name, **{"damp": DAMP, **options}).find(
        problem(model, sparsity, data=(x, torch.zeros(len(x))))
    )


def hessian(x: Tensor) -> Tensor:
    h = x.T @ x
    return h + DAMP * h.diagonal().mean() * torch.eye(len(h)).to(h)


def best(weight: Tensor, h: Tensor, keep: list[int]) -> tuple[float, Tensor]:
    """The kept weights that fit an output best, and its error."""
    w = torch.zeros_like(weight)
    if keep:
        w[keep] = torch.linalg.solve(h[keep][:, keep], h[keep] @ weight)
    return float((w - weight) @ h @ (w - weight)), w


def test_the_error_is_near_the_least_of_all_masks() -> None:
    """Over ten layers: a quarter of the way, at most, to the masks of the largest weights."""
    found, least, largest = 0.0, 0.0, 0.0
    for _ in range(10):
        model, x = layer_and_inputs(9, 1)
        weight, h = model[0].weight.detach()[0], hessian(x)
        masks, weights = solve(model, x, 5 / 9)
        keep = masks["0.weight"][0].nonzero().flatten().tolist()
        assert len(keep) == 4
        error, values = best(weight, h, keep)
        assert torch.allclose(weights["0.weight"][0], values, atol=1e-5)
        found += error
        least += min(best(weight, h, list(some))[0] for some in combinations(range(9), 4))
        largest += best(weight, h, weight.abs().argsort(descending=True)[:4].tolist())[0]
    assert least <= found <= least + 0.25 * (largest - least)


def error_of(model: nn.Sequential, x: Tensor, masks: Any) -> float:
    """The error of the best weights under a mask, output by output."""
    h = hessian(x)
    lines = zip(masks["0.weight"], model[0].weight.detach(), strict=True)
    return sum(best(weight, h, mask.nonzero().flatten().tolist())[0] for mask, weight in lines)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_its_masks_have_less_error_than_those_of_greedy_surgery(sparsity: float) -> None:
    errors = dict.fromkeys(("alps", "obc", "sparsegpt"), 0.0)
    for _ in range(3):
        model, x = layer_and_inputs(32, 24)
        for name in errors:
            masks, _ = solve(model, x, sparsity, name)
            assert int(masks["0.weight"].sum()) == round(32 * 24 * (1 - sparsity))
            errors[name] += error_of(model, x, masks)
    assert errors["alps"] < errors["obc"]
    assert errors["alps"] < 0.7 * errors["sparsegpt"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("granularity", ["weight", "nm(2,4)", "kernel", "channel"])
def test_it_has_less_error_than_magnitude(granularity: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 12)).eval()
    x = torch.rand(100, 4, 5, 5)

    def error(method: str, **options: Any) -> float:
        pruned = fxprune.apply(
            model, method, 0.5, granularity=granularity, example_inputs=x[:2], progress=False, **options
        )
        fxprune.verify(pruned)
        with torch.no_grad():
            return float((pruned(x) - model(x)).square().mean())

    data = {"data": (x, torch.zeros(100))}
    budget = "global" if granularity == "channel" else "uniform"
    assert error("alps", **data) < 0.7 * error("magnitude", budget=budget)


def test_dead_inputs_go_first_and_unread_weights_compete() -> None:
    x = torch.randn(50, 8)
    x[:, 3] = 0
    model = nn.Sequential(nn.Linear(8, 6))
    masks, weights = solve(model, x, 0.125)
    assert masks["0.weight"].sum(0).tolist() == [6, 6, 6, 0, 6, 6, 6, 6]
    assert torch.isfinite(weights["0.weight"]).all()


def test_half_precision_and_two_calls() -> None:
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(torch.bfloat16)
    options: dict[str, Any] = {"data": (x, torch.zeros(64)), "example_inputs": x, "progress": False}
    once = fxprune.apply(model, "alps", 0.5, **options)
    twice = fxprune.apply(once, "alps", 0.75, **options)
    for name, mask in fxprune.masks(twice).items():
        assert not (mask & ~fxprune.masks(once)[name]).any()
    assert once.get_parameter("0.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("option", [{"steps": 0}, {"batches": 0}, {"damp": -1.0}])
def test_options_that_do_not_fit_are_named(option: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        methods.get("alps", **option)
