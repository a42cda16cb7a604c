"""DSnoT against its exchanges made one by one, output by output."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import methods
from methods.problems import problem


def layer_and_inputs(inputs: int = 12, outputs: int = 9) -> tuple[nn.Sequential, Tensor]:
    x = torch.rand(100, inputs).double() @ torch.rand(inputs, inputs).double()
    return nn.Sequential(nn.Linear(inputs, outputs)).double(), x


def solve(model: nn.Module, x: Tensor, sparsity: float, **options: Any) -> Tensor:
    found: Any = methods.get("dsnot", **options).find(problem(model, sparsity, data=(x, torch.zeros(len(x)))))
    return found["0.weight"]


def exchanged(w: Tensor, x: Tensor, keep: set[int], cycles: int, enough: float) -> set[int]:
    """The exchanges of one output, in plain Python."""
    mean, variance, norm = x.mean(0), x.var(0, unbiased=False), x.norm(dim=0)
    limit = enough * float((x @ w).square().mean().sqrt())
    for _ in range(cycles):
        gone = [j for j in range(len(w)) if j not in keep]
        error = sum(float(w[j] * mean[j]) for j in gone)
        sign = 1 if error > 0 else -1
        if abs(error) <= limit:
            break
        grow = max(gone, key=lambda j: sign * float(w[j] * mean[j] / variance[j]))
        able = [j for j in keep if sign * float(w[j] * mean[j]) < 0]
        if not able or sign * float(w[grow] * mean[grow]) <= 0:
            break
        drop = min(able, key=lambda j: float(w[j].abs() * norm[j]))
        if abs(error - float(w[grow] * mean[grow]) + float(w[drop] * mean[drop])) >= abs(error):
            break
        keep = (keep | {grow}) - {drop}
    return keep


@pytest.mark.parametrize("start", ["wanda", "magnitude"])
@pytest.mark.parametrize("cycles", [1, 50])
def test_exchanges_are_those_of_the_formulas(start: str, cycles: int) -> None:
    model, x = layer_and_inputs()
    weight = model[0].weight.detach()
    first = solve(model, x, 0.5, start=start, enough=1e9)
    found = solve(model, x, 0.5, start=start, cycles=cycles)
    moved = 0
    for row in range(len(weight)):
        before = set(first[row].nonzero().flatten().tolist())
        after = set(found[row].nonzero().flatten().tolist())
        assert after == exchanged(weight[row], x, before, cycles, 0.1)
        assert len(after) == len(before)
        moved += before != after
    assert moved > 2


def test_the_first_mask_is_that_of_wanda() -> None:
    model, x = layer_and_inputs()
    first = solve(model, x, 0.5, enough=1e9)
    score = model[0].weight.detach().abs() * x.norm(dim=0)
    wanted = torch.zeros_like(first).scatter(1, score.topk(6, dim=1).indices, True)
    assert torch.equal(first, wanted)


def test_mean_errors_get_small() -> None:
    model, x = layer_and_inputs(64, 32)
    weight = model[0].weight.detach()

    def errors(mask: Tensor) -> Tensor:
        return ((weight * ~mask) @ x.mean(0)).abs()

    first, found = (solve(model, x, 0.6, enough=enough) for enough in (1e9, 0.02))
    assert bool((errors(found) <= errors(first) + 1e-12).all())
    assert float(errors(found).mean()) < 0.3 * float(errors(first).mean())


def test_a_whole_network_and_one_that_was_pruned_before() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 12)).eval()
    x = torch.rand(100, 4, 5, 5)
    options: dict[str, Any] = {"data": (x, torch.zeros(100)), "example_inputs": x[:2], "progress": False}
    once = fxprune.apply(model, "dsnot", 0.5, **options)
    twice = fxprune.apply(once, "dsnot", 0.7, **options)
    assert sum(int(mask.sum()) for mask in fxprune.masks(once).values()) == (144 + 864) // 2
    for name, mask in fxprune.masks(twice).items():
        assert not (mask & ~fxprune.masks(once)[name]).any()
        assert torch.equal(twice.get_parameter(name), model.get_parameter(name) * mask)


def test_patterns_stay_as_they_were_first() -> None:
    model, x = layer_and_inputs()
    data = (x, torch.zeros(100))
    first, found = (
        fxprune.apply(model, name, granularity="2:4", data=data, progress=False, budget="uniform")
        for name in ("wanda", "dsnot")
    )
    assert torch.equal(fxprune.masks(first)["0.weight"], fxprune.masks(found)["0.weight"])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="enough=-1"):
        methods.get("dsnot", enough=-1.0)
