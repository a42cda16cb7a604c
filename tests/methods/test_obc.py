"""OBC against removal of one weight at a time, each by a least-squares fit of all that stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import methods
from methods.problems import problem

DAMP = 0.01


def layer_and_inputs(inputs: int, outputs: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, inputs).double() @ torch.randn(inputs, inputs).double()
    return nn.Sequential(nn.Linear(inputs, outputs)).double(), x


def solve(model: nn.Module, x: Tensor, sparsity: float, **options: Any) -> Any:
    return methods.get("obc", **{"damp": DAMP, **options}).find(
        problem(model, sparsity, data=(x, torch.zeros(len(x))))
    )


def best(weight: Tensor, h: Tensor, keep: list[int]) -> tuple[float, Tensor]:
    """The kept weights that fit an output best, and its error."""
    w = torch.zeros_like(weight)
    if keep:
        w[keep] = torch.linalg.solve(h[keep][:, keep], h[keep] @ weight)
    return float((w - weight) @ h @ (w - weight)), w


def greedy(weight: Tensor, h: Tensor, steps: int) -> list[int]:
    """Try every weight, remove the one that costs least, fit the rest, and again."""
    keep = list(range(len(weight)))
    for _ in range(steps):
        _, worst = min((best(weight, h, [k for k in keep if k != one])[0], one) for one in keep)
        keep.remove(worst)
    return keep


def test_one_output_is_pruned_greedily_and_exactly() -> None:
    model, x = layer_and_inputs(9, 1)
    masks, weights = solve(model, x, 5 / 9)
    weight, h = model[0].weight.detach()[0], x.T @ x
    h = h + DAMP * h.diagonal().mean() * torch.eye(9).double()
    keep = greedy(weight, h, 5)
    assert masks["0.weight"][0].nonzero().flatten().tolist() == keep
    assert torch.allclose(weights["0.weight"][0], best(weight, h, keep)[1])


def test_outputs_take_the_cheapest_steps_of_all() -> None:
    model, x = layer_and_inputs(6, 4)
    masks, weights = solve(model, x, 0.5)
    h = x.T @ x
    h = h + DAMP * h.diagonal().mean() * torch.eye(6).double()
    assert int(masks["0.weight"].sum()) == 12
    steps = []
    for row, weight in enumerate(model[0].weight.detach()):
        keep = masks["0.weight"][row].nonzero().flatten().tolist()
        assert keep == greedy(weight, h, 6 - len(keep))
        assert torch.allclose(weights["0.weight"][row], best(weight, h, keep)[1])
        errors = [best(weight, h, greedy(weight, h, number))[0] for number in range(7)]
        costs = torch.tensor(errors).diff().cummax(0).values
        taken = 6 - len(keep)
        steps.append((max([0.0, *costs[:taken].tolist()]), min([*costs[taken:].tolist(), float("inf")])))
    # No step that was taken costs more than one that was not.
    assert max(done for done, _ in steps) <= min(open_ for _, open_ in steps) * (1 + 1e-9)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("granularity", ["weight", "nm(2,4)", "kernel", "channel"])
def test_it_has_less_error_than_magnitude(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 12)).eval()
    x = torch.rand(100, 4, 5, 5)

    def error(method: str, **options: Any) -> float:
        pruned = fxprune.apply(
            model, method, 0.5, example_inputs=x, data=(x, torch.zeros(100)), granularity=granularity,
            progress=False, **options,
        )  # fmt: skip
        fxprune.verify(pruned)
        return float((pruned(x) - model(x)).detach().square().mean())

    assert error("obc") < error("magnitude", budget="global" if granularity == "channel" else "uniform")


def test_pruned_weights_stay_pruned() -> None:
    model, x = layer_and_inputs(8, 4)
    options: dict[str, Any] = {"example_inputs": x, "data": (x, torch.zeros(40)), "progress": False}
    once = fxprune.apply(model, "magnitude", 0.25, example_inputs=x, progress=False)
    twice = fxprune.apply(once, "obc", 0.5, **options)
    assert bool((fxprune.masks(once)["0.weight"] | ~fxprune.masks(twice)["0.weight"]).all())


def test_layers_with_many_inputs_are_refused() -> None:
    model, x = layer_and_inputs(9, 2)
    with pytest.raises(ValueError, match=r"'0\.weight' has 9 inputs, more than most=8; take sparsegpt"):
        solve(model, x, 0.5, most=8)
    with pytest.raises(ValueError, match="damp=-1"):
        methods.get("obc", damp=-1.0)
