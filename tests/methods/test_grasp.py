"""GraSP against the explicit Hessian, finite differences and the hand example."""

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import methods
from fxprune.methods import Scores
from methods.problems import TOY_A_DATA, half_square, problem, toy_a

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(4))
Y = torch.arange(8) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_toy_a(scored: list[Scores]) -> None:
    asked = problem(toy_a(), 4 / 6, data=TOY_A_DATA, loss_fn=half_square)
    masks = methods.get("grasp").find(asked)
    assert [score.tolist() for score in scored[0].values()] == [[[-756, 378], [5292, 1323]], [[-54, 6210]]]
    # The largest are kept: 6210 and 5292, not the largest absolute value of the negative ones.
    assert [mask.int().tolist() for mask in masks.values()] == [[[0, 0], [1, 0]], [[0, 1]]]
    asked = problem(toy_a(), 2 / 6, data=TOY_A_DATA, loss_fn=half_square)
    signed, absolute = (methods.get("grasp", rank=rank).find(asked) for rank in ("signed", "absolute"))
    assert [mask.int().tolist() for mask in signed.values()] == [[[0, 1], [1, 1]], [[0, 1]]]
    assert [mask.int().tolist() for mask in absolute.values()] == [[[1, 0], [1, 1]], [[0, 1]]]


@pytest.mark.parametrize("temperature", [None, 1.0, 5.0])
def test_against_the_explicit_hessian(scored: list[Scores], temperature: float | None) -> None:
    model = net()
    data = [(x.double(), y) for x, y in BATCHES]
    asked = problem(model, 0.5, data=data)
    methods.get("grasp", batches=2, temperature=temperature).find(asked)
    names = list(asked.weights)
    sizes = [asked.weights[name].numel() for name in names]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split(sizes)
        weights = {n: p.view_as(asked.weights[n]) for n, p in zip(names, parts, strict=True)}
        outputs = [(torch.func.functional_call(model, weights, (x,)), y) for x, y in data]
        by = temperature or 200.0
        return torch.stack([nn.functional.cross_entropy(out / by, y) for out, y in outputs]).mean()

    flat = torch.cat([asked.weights[name].flatten() for name in names])
    hessian = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    expected = flat * (hessian @ gradient)
    found = torch.cat([score.flatten() for score in scored[0].values()])
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)
    # H g is how the gradient changes along itself.
    step = 1e-4 / gradient.norm()
    ahead, behind = (
        torch.autograd.functional.jacobian(loss, flat + sign * step * gradient) for sign in (1, -1)
    )
    assert torch.allclose(
        found, flat * (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-9 * found.abs().max()
    )


def test_micro_batches_add_up(scored: list[Scores]) -> None:
    for micro_batch in (None, 3, 1):
        data = (X.double(), Y)
        methods.get("grasp").find(problem(net(), 0.5, data=data, micro_batch=micro_batch))
    whole, *others = [torch.cat([score.flatten() for score in scores.values()]) for scores in scored]
    # The Hessian of a mean is the mean of the Hessians; both meet the gradient of the whole batch.
    assert all(torch.allclose(other, whole, rtol=1e-10, atol=0) for other in others)


def test_a_linear_loss_has_no_hessian() -> None:
    single = nn.Linear(3, 2)
    asked = problem(single, 0.5, data=(X, Y), loss_fn=lambda output, target: output.sum())
    assert [mask.int().tolist() for mask in methods.get("grasp").find(asked).values()] == [
        [[1, 1, 1], [0, 0, 0]]
    ]


def test_attention_has_a_second_derivative(scored: list[Scores]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).mean((1, 2))

    methods.get("grasp").find(problem(Attention(), 0.5, data=(torch.randn(5, 6, 4), Y[:5])))
    assert scored[0]["qkv.weight"].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batches": 0}, "batches=0"), ({"temperature": 0.0}, r"temperature=0\.0, expected a number above 0")],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"method 'grasp': {words}"):
        methods.get("grasp", **options)


def test_temperature_needs_outputs() -> None:
    asked = problem(
        net().float(), data={"x": X, "y": Y}, loss_fn=lambda model, batch: model(batch["x"]).sum()
    )
    assert methods.get("grasp").find(asked)
    with pytest.raises(ValueError, match=r"temperature=7\.0 cannot reach the outputs inside loss_fn"):
        methods.get("grasp", temperature=7.0).find(asked)


def test_hard_sigmoids_have_a_second_derivative() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Hardsigmoid(), torch.nn.Linear(5, 3))
    spelled = torch.nn.Sequential(net[0], _Spelled(), net[2])
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    found = [
        fxprune.masks(fxprune.apply(model, "grasp", 0.5, example_inputs=x, data=(x, y)))
        for model in (net, spelled)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class _Spelled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x + 3, 0, 6) / 6
