"""ProsPr against the hand example, training written down a second time, and SNIP."""

from typing import Any

import pytest
import torch
from torch import nn

from fxprune import methods
from fxprune.methods import Scores
from methods.problems import half_square, problem

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(4)).double()
Y = torch.arange(8) % 3
BATCHES = [(X[:2], Y[:2]), (X[2:5], Y[2:5]), (X[5:], Y[5:])]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize(("order", "score"), [("full", 3.24), ("first", 3.6)])
def test_one_weight_one_step(scored: list[Scores], order: str, score: float) -> None:
    # f = w x, L = f^2 / 2, w = 2, x = 1, lr = 0.1: w_1 = 1.8; 2 * 1.8 * (1 - 0.1), or 2 * 1.8; SNIP has 4.
    asked = problem(Padded(), 0.5, data=(torch.ones(1, 1), torch.zeros(1, 1)), loss_fn=half_square)
    methods.get("prospr", steps=1, lr=0.1, order=order).find(asked)
    assert scored[-1]["used.weight"].item() == pytest.approx(score)
    assert scored[-1]["other.weight"].item() == 0


class Padded(nn.Module):
    """f = 2 x, and a weight that does nothing, so that there is something to choose."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(1, 1, bias=False)
        self.other = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.used.weight, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.other(x)
        return self.used(x)


def meta_loss(gates: torch.Tensor, steps: int, lr: float, momentum: float, batches: int) -> torch.Tensor:
    """The loss after training from gated weights, as one function of the gates."""
    model = net()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    gated = [name for name, p in weights.items() if p.dim() > 1]
    parts = gates.split([weights[name].numel() for name in gated])
    now = weights | {n: weights[n] * p.view_as(weights[n]) for n, p in zip(gated, parts, strict=True)}
    now = {name: value if value.requires_grad else value.requires_grad_() for name, value in now.items()}
    speed = dict.fromkeys(now, torch.zeros(()).double())
    for step in range(steps + 1):
        x, y = BATCHES[step % batches]
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, now, (x,)), y)
        if step == steps:
            break
        slopes = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        speed = {name: momentum * speed[name] + slope for name, slope in zip(now, slopes, strict=True)}
        now = {name: value - lr * speed[name] for name, value in now.items()}
    return loss


@pytest.mark.parametrize(
    ("steps", "momentum", "batches"), [(0, 0.0, 1), (1, 0.0, 1), (3, 0.0, 1), (2, 0.0, 3), (3, 0.9, 2)]
)
def test_against_finite_differences(scored: list[Scores], steps: int, momentum: float, batches: int) -> None:
    asked = problem(net(), 0.5, data=BATCHES)
    methods.get("prospr", steps=steps, lr=0.3, momentum=momentum, batches=batches).find(asked)
    found = torch.cat([score.flatten() for score in scored[0].values()])
    for index in range(0, len(found), 5):
        step = torch.zeros_like(found)
        step[index] = 1e-5
        ahead, behind = (
            meta_loss((torch.ones_like(found) + sign * step), steps, 0.3, momentum, batches)
            for sign in (1, -1)
        )
        assert float((ahead - behind).detach().abs()) / 2e-5 == pytest.approx(
            float(found[index]), rel=1e-5, abs=1e-9
        )


def test_no_steps_is_snip(scored: list[Scores]) -> None:
    for name, options in (("snip", {}), ("prospr", {"steps": 0}), ("prospr", {"steps": 0, "order": "first"})):
        methods.get(name, **options).find(problem(net(), 0.5, data=BATCHES))
    snip, *others = scored
    assert all(torch.equal(other[name], snip[name]) for other in others for name in snip)


def test_training_that_diverges_is_an_error() -> None:
    data = (X * 1e3, X)
    asked = problem(net(), 0.5, data=data, loss_fn=half_square)
    with pytest.raises(ValueError, match=r"method 'prospr': the loss is (nan|inf)"):
        methods.get("prospr", steps=60, lr=1e6).find(asked)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"batches": 0}, "batches=0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"method 'prospr': .*{words}"):
        methods.get("prospr", **options)
