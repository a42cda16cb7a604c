"""SynFlow against numbers computed by hand, and against the network itself run with |w|."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.paths.count import flow
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import Masks, dense, is_subset, total
from methods.problems import problem, toy_a


def asked(model: nn.Module, example: torch.Tensor, sparsity: float, **fields: Any) -> Problem:
    return problem(model, sparsity, graph=lower(capture(model, example)), **fields)


def scores(question: Problem, resolution: str = "spatial") -> dict[str, torch.Tensor]:
    """|w| d ln R / d|w| with all weights in place."""
    sizes = {name: weight.abs() for name, weight in question.weights.items()}
    found = flow(question.graph, sizes, resolution=resolution, pool="mean").gradients
    return {name: size * found[name] for name, size in sizes.items()}


def naive_scores(model: nn.Module, example: torch.Tensor, masks: Masks) -> dict[str, torch.Tensor]:
    """The definition on the eager network: |w| m, no biases, no norms, ones in, in float64."""
    net = copy.deepcopy(model).double().eval()
    for module in net.modules():
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, child_name, nn.Identity())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(parameter.abs() * masks[name] if name in masks else torch.zeros_like(parameter))
    total_flow = net(torch.ones_like(example[:1], dtype=torch.float64)).sum()
    weights = {name: p for name, p in net.named_parameters() if name in masks}
    gradients = torch.autograd.grad(total_flow, list(weights.values()))
    # Divided by R, as ln R is what the library differentiates; the order is the same.
    return {
        name: (p * g / total_flow).detach() for (name, p), g in zip(weights.items(), gradients, strict=True)
    }


def naive_synflow(model: nn.Module, example: torch.Tensor, question: Problem, rounds: int) -> Masks:
    masks = dense(question.weights)
    size = sum(mask.numel() for mask in masks.values())
    for t in range(1, rounds + 1):
        target = question.budget.total
        keep = target if t == rounds else int(size * (target / size) ** (t / rounds) + 0.5)
        found = naive_scores(model, example, masks)
        flat = torch.cat([found[name].where(masks[name], -torch.inf).flatten() for name in masks])
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
        parts = chosen.split([mask.numel() for mask in masks.values()])
        masks = {name: part.view(masks[name].shape) for name, part in zip(masks, parts, strict=True)}
    return masks


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.second(self.first(x).relu()) + x
        return self.fc(self.down(x.relu()).mean((2, 3)))


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 1 * 1, 4),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {"chain": chain, "residual": Residual}
EXAMPLE = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("resolution", ["spatial", "channel"])
def test_toy_a(resolution: str) -> None:
    # R = 8; SynFlow scores [[1, 1], [4, 2]] and [[2, 6]].
    question = asked(toy_a(), torch.zeros(2, 2), 0.5)
    found = scores(question, resolution)
    assert torch.allclose(8 * found["0.weight"], torch.tensor([[1.0, 1.0], [4.0, 2.0]]))
    assert torch.allclose(8 * found["2.weight"], torch.tensor([[2.0, 6.0]]))


@pytest.mark.parametrize("resolution", ["spatial", "channel"])
def test_toy_a_in_two_rounds(resolution: str) -> None:
    # d = 1/3 in two rounds: .57735 * 6 rounds to 3 kept (published code truncates what it prunes: 4 kept).
    # Kept 3: 6, 4, and the first of the two scores 2, W1[1, 1]. Then R = 6, W1 [[0, 0], [4, 2]], W2 [[0, 6]].
    question = asked(toy_a(), torch.zeros(2, 2), 1 - 2 / 6)
    masks = methods.get("synflow", rounds=2, resolution=resolution).find(question)
    assert [mask.tolist() for mask in masks.values()] == [[[False, False], [True, False]], [[False, True]]]


@pytest.mark.parametrize("name", NETS)
def test_scores_equal_those_of_the_network_itself(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    question = asked(model, EXAMPLE, 0.5)
    expected = naive_scores(model, EXAMPLE, question.masks)
    for parameter, found in scores(question).items():
        assert torch.allclose(found.double(), expected[parameter], rtol=1e-4, atol=1e-9), parameter


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_masks_equal_those_of_the_naive_loop(name: str, sparsity: float) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    question = asked(model, EXAMPLE, sparsity)
    expected = naive_synflow(model, EXAMPLE, question, rounds=8)
    masks = methods.get("synflow", rounds=8).find(question)
    assert total(masks) == question.budget.total
    assert all(torch.equal(masks[parameter], expected[parameter]) for parameter in masks)


def test_every_layer_of_a_chain_carries_the_whole_flow() -> None:
    torch.manual_seed(0)
    for found in scores(asked(chain(), EXAMPLE, 0.5)).values():
        assert float(found.sum()) == pytest.approx(1.0, rel=1e-5)


def test_a_skip_takes_its_share() -> None:
    # h = W1 x, y = W2 h + h, out = W3 y: R = 32.25; 7.5 of it flow through the skip, past W2.
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(2, n, bias=False) for n in (2, 2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            return self.c(self.b(h) + h)

    model = Skip()
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor([[1.0, 2.0], [0.5, 1.0]]))
        model.b.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.5]]))
        model.c.weight.copy_(torch.tensor([[1.0, 3.0]]))
    sums = [float(found.sum()) for found in scores(asked(model, torch.zeros(2, 2), 0.5)).values()]
    assert sums == pytest.approx([1.0, 24.75 / 32.25, 1.0], rel=1e-5)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("sparsity", [0.9, 0.99])
@pytest.mark.parametrize("resolution", ["spatial", "channel"])
def test_no_layer_collapses_in_a_hundred_rounds(sparsity: float, resolution: str) -> None:
    torch.manual_seed(0)
    masks = methods.get("synflow", resolution=resolution).find(asked(chain(), EXAMPLE, sparsity))
    assert all(bool(mask.any()) for mask in masks.values())


def test_signs_biases_and_norms_do_not_matter() -> None:
    torch.manual_seed(0)
    model = chain()
    plain = methods.get("synflow", rounds=5).find(asked(model, EXAMPLE, 0.8))
    with torch.no_grad():
        model[0].weight.neg_()
        model[4].bias.fill_(-9.0)
        model[1].running_mean.fill_(3.0)
        model[1].weight.fill_(-2.0)
    changed = methods.get("synflow", rounds=5).find(asked(model, EXAMPLE, 0.8))
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


def test_the_callers_schedule_and_masks() -> None:
    torch.manual_seed(0)
    model = chain()
    start = {name: torch.rand(w.shape) < 0.7 for name, w in problem(model).weights.items()}
    question = asked(model, EXAMPLE, 0.8, masks=start, schedule="linear(3)")
    masks = methods.get("synflow").find(question)
    assert is_subset(masks, start)
    assert total(masks) == question.budget.total


def test_large_weights_stay_finite() -> None:
    deep = nn.Sequential(*(nn.Linear(16, 16) for _ in range(60)))
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.mul_(1e4)  # R is about 1e300
    question = asked(deep, torch.zeros(2, 16), 0.9)
    assert all(bool(torch.isfinite(found).all()) for found in scores(question).values())
    assert total(methods.get("synflow", rounds=3).find(question)) == question.budget.total


def test_layers_that_are_not_pruned_carry_flow_too() -> None:
    torch.manual_seed(0)
    model = chain()
    question = asked(model, EXAMPLE, 0.5)
    weights = {name: weight for name, weight in question.weights.items() if name != "4.weight"}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    some = dataclasses.replace(
        question, weights=weights, masks=dense(weights), budget=plan("global", 0.5, shapes)
    )
    masks = methods.get("synflow", rounds=1).find(some)
    assert masks.keys() == weights.keys()
    flat = torch.cat([scores(question)[name].flatten() for name in weights])
    order = flat.argsort(descending=True, stable=True)[: some.budget.total]
    assert bool(torch.cat([mask.flatten() for mask in masks.values()])[order].all())
