"""Iter-SNIP, FORCE and GRASP-It: the hand example, the loops written down a second time, invariants."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fxprune import methods
from fxprune.methods import Problem
from fxprune.sparsity.granularity import resolve
from fxprune.sparsity.masks import Masks, is_subset, total
from methods.problems import TOY_A_DATA, half_square, problem, toy_a, toy_f

TOY_F_DATA = (torch.tensor([[2.0, 3.0]]), torch.tensor([[0.0]]))
X = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(12) % 4
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
ITERATED = ("iter-snip", "force", "grasp-it")


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *head)


def lists(masks: Masks) -> list[Any]:
    return [mask.int().tolist() for mask in masks.values()]


def same(left: Masks, right: Masks) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def five_then(number: int) -> dict[str, Any]:
    """Five weights of six after round one, then ``number``."""
    return {
        "sparsity": 1 - number / 6,
        "schedule": lambda t, rounds, target: 5 / 6 if t == 1 else target,
        "data": TOY_F_DATA,
        "loss_fn": half_square,
    }


def test_force_regrows_and_iter_snip_does_not() -> None:
    # Dense |w g| = 22 33 44 66 | 11 110: W2[0, 0] goes. At the sparse network f = -10, and with dense weights
    # |w g| = 0 0 40 60 | 10 100: it returns, row 0 of W1 goes.
    force = methods.get("force", rounds=2).find(problem(toy_f(), **five_then(4)))
    assert lists(force) == [[[0, 0], [1, 1]], [[1, 1]]]
    # Without regrowth three scores are positive for four places: the first tie by index, never all six.
    for name, options in (("iter-snip", {}), ("force", {"regrow": False})):
        found = methods.get(name, rounds=2, **options).find(problem(toy_f(), **five_then(4)))
        assert lists(found) == [[[1, 0], [1, 1]], [[0, 1]]]


def test_grasp_it_of_toy_a() -> None:
    # g^2 = 324 81 1296 324 | 81 2025
    found = methods.get("grasp-it", rounds=1).find(
        problem(toy_a(), 3 / 6, data=TOY_A_DATA, loss_fn=half_square)
    )
    assert lists(found) == [[[1, 0], [1, 0]], [[0, 1]]]


@pytest.mark.parametrize("name", ["iter-snip", "force"])
@pytest.mark.parametrize("granularity", ["weight", "kernel"])
def test_one_round_is_snip(name: str, granularity: str) -> None:
    def find(name: str, **options: Any) -> Masks:
        asked = problem(conv_net(), 0.8, data=BATCHES, granularity=resolve(granularity))
        return methods.get(name, batches=2, **options).find(asked)

    assert same(find(name, rounds=1), find("snip"))


def naive(net: nn.Module, name: str, budgets: list[int]) -> list[Masks]:
    """The paper's loop over plain tensors: weights are zeroed in place, scores are sorted."""
    parameters = {key: p for key, p in net.named_parameters() if p.dim() > 1}
    initial = {key: p.detach().clone() for key, p in parameters.items()}
    masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in parameters.items()}
    path = []
    for number in budgets:
        with torch.no_grad():
            for key, p in parameters.items():
                p.copy_(initial[key] * masks[key])
        net.zero_grad()
        for x, y in BATCHES:
            nn.functional.cross_entropy(net(x), y).backward()
        gradients = {key: p.grad / 2 for key, p in parameters.items()}
        flat = torch.cat([
            (gradients[key] ** 2 if name == "grasp-it" else (initial[key] * gradients[key]).abs())
            .masked_fill(~masks[key] & (name != "force"), -1.0).flatten()
            for key in parameters
        ])  # fmt: skip
        kept = torch.zeros(len(flat), dtype=torch.bool)
        kept[flat.argsort(descending=True, stable=True)[:number]] = True
        parts = kept.split([p.numel() for p in parameters.values()])
        masks = {key: part.view_as(p) for (key, p), part in zip(parameters.items(), parts, strict=True)}
        path.append(masks)
    return path


@pytest.mark.parametrize("name", ITERATED)
@pytest.mark.parametrize("schedule", [None, "linear"])
def test_against_the_loop_of_the_paper(name: str, schedule: str | None) -> None:
    asked = problem(conv_net(), 0.75, data=BATCHES, schedule=schedule)
    size, final = 155, asked.budget.total
    assert sum(asked.budget.sizes.values()) == size
    relative = final / size
    budgets = [
        int(size * (relative ** (t / 5) if schedule is None else 1 - t / 5 * (1 - relative)) + 0.5)
        for t in range(1, 6)
    ]
    assert budgets[-1] == final
    found = methods.get(name, rounds=5, batches=2, mode="train").find(asked)
    assert same(found, naive(conv_net(), name, budgets)[-1])


@pytest.mark.parametrize("name", ITERATED)
def test_masks_are_nested_unless_weights_return(name: str) -> None:
    path = naive(conv_net(), name, [120, 80, 50, 30])
    for rounds in range(2, 5):
        counts = [120, 80, 50, 30][:rounds]

        def density(t: int, rounds: int, target: float, counts: list[int] = counts) -> float:
            return counts[t - 1] / 155

        asked = problem(conv_net(), 1 - counts[-1] / 155, data=BATCHES, schedule=density)
        assert same(methods.get(name, rounds=rounds, batches=2).find(asked), path[rounds - 1])
    nested = all(is_subset(later, earlier) for earlier, later in pairwise(path))
    assert nested == (name != "force")


@pytest.mark.parametrize("name", ["force", "iter-snip"])
def test_a_cut_network_keeps_part_of_what_it_had(name: str) -> None:
    # The chain is cut in the middle, so that no weight has a score: nothing moves to other places.
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    cut = problem(net).masks
    cut["1.weight"][:] = False
    asked = problem(net, 0.8, data=(torch.ones(4, 3), torch.tensor([0, 1, 0, 0])), masks=cut)
    found = methods.get(name, rounds=3).find(asked)
    assert total(found) == asked.budget.total == 5
    assert is_subset(found, cut)


@pytest.mark.parametrize("name", ITERATED)
def test_the_callers_model_is_left_alone(name: str) -> None:
    net = conv_net()
    net[5].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    asked: Problem = problem(net, 0.7, data=BATCHES)
    weights = {key: value.clone() for key, value in asked.weights.items()}
    state = torch.get_rng_state()
    methods.get(name, rounds=3).find(asked)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(value, weights[key]) for key, value in asked.weights.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not net[5].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_rounds_read_the_data_anew() -> None:
    loader = torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 4, shuffle=True)
    seen: list[torch.Tensor] = []

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(target)
        return nn.functional.cross_entropy(output, target)

    find = methods.get("force", rounds=4).find
    first = find(problem(conv_net(), 0.9, data=loader, loss_fn=loss_fn))
    batches = {tuple(target.tolist()) for target in seen}
    assert len(seen) == 4
    assert len(batches) > 1
    assert same(first, find(problem(conv_net(), 0.9, data=loader, loss_fn=loss_fn)))


@pytest.mark.parametrize("name", ITERATED)
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"method '{name}': batches=0, expected an integer of at least 1"):
        methods.get(name, batches=0)
    with pytest.raises(ValueError, match="rounds=0"):
        methods.get(name, rounds=0)
