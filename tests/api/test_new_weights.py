"""Methods that return masks and new values of the weights that these keep."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.methods import Problem

X = torch.arange(8.0).view(2, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def doubled(problem: Problem) -> Any:
    """The largest weights, twice as large; pruned ones have values that must not be looked at."""
    masks = fxprune.methods.get("magnitude").masks(problem)
    return masks, {
        name: (2 * weight).where(masks[name], float("nan")) for name, weight in problem.weights.items()
    }


DOUBLED = fxprune.Method("doubled", doubled, updates=True)


def prune(model: nn.Module, method: fxprune.Method, **options: Any) -> Any:
    return fxprune.apply(model, method, 0.5, example_inputs=X, progress=False, **options)


@pytest.mark.parametrize("returns", ["graph", "module", "inplace"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_kept_weights_have_the_new_values(returns: str, device: str | None) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, DOUBLED, returns=returns, device=device)
    masks = fxprune.masks(pruned)
    for name, mask in masks.items():
        assert torch.equal(pruned.get_parameter(name), 2 * before[name] * mask)
    assert torch.equal(pruned.get_parameter("0.bias"), before["0.bias"])
    fxprune.verify(pruned)
    if returns != "inplace":
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_weights_are_those_of_the_round_that_was_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``of="latency"`` a method finds masks again and again, and the best need not be the last."""
    factors = iter([3.0, 5.0, 7.0])

    def scaled(problem: Problem) -> Any:
        factor = next(factors)
        return {n: m.clone() for n, m in problem.masks.items()}, {
            n: factor * w for n, w in problem.weights.items()
        }

    def find_in_time(network: Any, problem: Problem, wish: Any, find: Any) -> Any:
        return [find(problem) for _ in range(3)][1], None

    monkeypatch.setattr("fxprune.search.is_timed", lambda problem: True)
    monkeypatch.setattr("fxprune.search.find_in_time", find_in_time)
    model = net()
    method = fxprune.Method("scaled", scaled, updates=True)
    pruned = fxprune.apply(model, method, 0.0, example_inputs=X, progress=False)
    assert torch.equal(pruned.get_parameter("0.weight"), 5.0 * model[0].weight)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = model[0].weight.detach().clone()
    pruned = prune(model, DOUBLED)
    assert torch.equal(pruned.get_parameter("0.weight"), 2 * before * fxprune.masks(pruned)["0.weight"])
    assert pruned.get_parameter("0.weight") is pruned.get_parameter("2.weight")


def test_a_repaired_weight_has_its_old_value() -> None:
    def last_alone(problem: Problem) -> Any:
        masks = {name: torch.zeros_like(mask) for name, mask in problem.masks.items()}
        masks["0.weight"].view(-1)[: problem.budget.total] = True
        return masks, {name: torch.full_like(weight, 7.0) for name, weight in problem.weights.items()}

    model = net()
    pruned = prune(model, fxprune.Method("odd", last_alone, updates=True), on_collapse="repair")
    mask = fxprune.masks(pruned)["2.weight"]
    assert mask.any()
    assert torch.equal(pruned.get_parameter("2.weight")[mask], model[2].weight[mask])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda w: list(w), TypeError, "weights in a list, not a dict"),
        (lambda w: {"x": w["0.weight"]}, ValueError, "no prunable parameter of that name"),
        (
            lambda w: {"0.weight": w["0.weight"].T},
            ValueError,
            r"of shape \(4, 6\), the parameter has \(6, 4\)",
        ),
        (lambda w: {"0.weight": w["0.weight"].int()}, TypeError, "floating-point tensor, got torch.int32"),
        (lambda w: {"0.weight": w["0.weight"] / 0}, ValueError, "some kept values are NaN"),
        (lambda w: {"0.weight": 3.0}, TypeError, "got a float"),
    ],
)
def test_wrong_weights_are_refused(change: Any, kind: type[Exception], message: str) -> None:
    def find(problem: Problem) -> Any:
        return fxprune.methods.get("magnitude").find(problem), change(dict(problem.weights))

    with pytest.raises(kind, match=message):
        prune(net(), fxprune.Method("odd", find, updates=True))


def test_what_does_not_go_with_new_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="without updates=True"):
        prune(net(), fxprune.Method("odd", doubled))
    with pytest.raises(ValueError, match="reinit=True draws the weights anew"):
        prune(net(), DOUBLED, reinit=True)
    with pytest.raises(ValueError, match="returns weights that fit its own masks"):
        prune(net(), DOUBLED, shuffle="layer")
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"'0\.weight' is computed by a parametrization"):
        prune(model, DOUBLED)


def test_a_pruner_takes_masks_only() -> None:
    with pytest.raises(ValueError, match="criterion 'doubled' returns new weights"):
        fxprune.Pruner(net(), "gmp", 0.5, example_inputs=X, criterion=DOUBLED, total=4)
    # One that does not say so is found out when it is asked.
    liar = fxprune.Method("liar", doubled)
    pruner = fxprune.Pruner(net(), "gmp", 0.5, example_inputs=X, criterion=liar, total=4)
    with pytest.raises(ValueError, match="returns new weights with its masks"):
        pruner.step(4)
