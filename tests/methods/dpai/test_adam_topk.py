"""The ascent against a naive loop with torch's Adam, and against the table."""

import math
from typing import Any

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.dpai.adam_topk import FLUSH_EVERY, LONGEST_STEP
from fxprune.methods.dpai.objective import Objective
from fxprune.paths.count import flow
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import Masks
from methods.dpai.ascents import KINDS, TOY_M, ascent_at, stack
from methods.problems import problem


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_adam_on_toy_m(kind: str) -> None:
    net, masks = stack(*TOY_M)
    graph = lower(capture(net, torch.zeros(1, 2)))
    ascent = ascent_at(graph, masks, Objective(1, 0), kind)
    assert ascent.step() == pytest.approx(math.log(3))
    rises = torch.cat([state.rise for state in ascent.states])
    assert torch.allclose(rises, 0.005 * torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0.0]))


@pytest.mark.slow
@pytest.mark.parametrize("growth", [1.0, 1.05, 0.999 / 0.9, 1.2, 2.0, 1e3])
def test_no_step_is_longer_than_the_leap(growth: float) -> None:
    """The worst are gradients that grow as the weights of the two means part: these all but reach it."""
    score = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimiser = torch.optim.Adam([score], lr=0.25, maximize=True)
    longest = before = 0.0
    for step in range(4000 if growth < 1.15 else 200):
        power = step - 2000 if growth < 1.15 else step % 50
        score.grad = torch.tensor(growth**power, dtype=torch.float64)
        optimiser.step()
        longest, before = max(longest, float(score.detach()) - before), float(score.detach())
    assert longest <= 0.25 * LONGEST_STEP
    assert growth != 0.999 / 0.9 or longest > 0.99 * 0.25 * LONGEST_STEP


def naive_dpai(question: Problem, objective: Objective, steps: int, resolution: Any) -> Masks:
    """The algorithm word by word: signed scores, a sort in every step, torch's own Adam."""
    layers = plan("erk", 1 - question.budget.density, {n: tuple(m.shape) for n, m in question.masks.items()})
    assert layers.layers is not None
    scores = {
        name: torch.randn(mask.shape, generator=question.generator).requires_grad_()
        for name, mask in question.masks.items()
    }
    optimiser = torch.optim.Adam(scores.values(), lr=0.005, maximize=True)

    def chosen() -> Masks:
        masks = {}
        for name, score in scores.items():
            order = score.detach().abs().flatten().argsort(descending=True, stable=True)
            mask = torch.zeros(score.numel(), dtype=torch.bool)
            mask[order[: layers.layers[name]]] = True
            masks[name] = mask.view(score.shape)
        return masks

    for _ in range(steps):
        masks = chosen()
        ones = {name: mask.double() for name, mask in masks.items()}
        gradients = flow(question.graph, ones, resolution=resolution, dtype=torch.float64).gradients
        for name, score in scores.items():
            effective = (gradients[name] > 0) & masks[name]
            alive = effective.flatten(2).any(2) if effective.dim() > 2 else effective
            dead_nodes = ~alive.any(1, keepdim=True).expand(alive.shape)
            factor = (1 - objective.alpha) + objective.alpha * (
                (1 - objective.beta) * dead_nodes.double() + objective.beta * (~alive).double()
            )
            shaped = factor.view(*factor.shape, *[1] * (score.dim() - 2))
            score.grad = (score.detach().sign() * gradients[name] * shaped).float()
        optimiser.step()
    return chosen()


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("resolution", "objective", "name"),
    one_in(
        3,
        ["channel", "spatial"],
        [Objective(0, 0), Objective(1, 0), Objective(1, 1), Objective(0.9, 0.3)],
        ["residual", "grouped", "dead_taps"],
    ),
)
def test_masks_are_those_of_the_naive_loop(resolution: str, objective: Objective, name: str) -> None:
    steps = FLUSH_EVERY + 10
    torch.manual_seed(0)
    model, example = NETS[name]()
    graph = lower(capture(model, example))
    asked = problem(model, 0.8, graph=graph, seed=4)
    once_more = problem(model, 0.8, graph=graph, seed=4)
    expected = naive_dpai(once_more, objective, steps, resolution)
    method = methods.get(
        "dpai", alpha=objective.alpha, beta=objective.beta, steps=steps, resolution=resolution
    )
    found = method.find(asked)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
