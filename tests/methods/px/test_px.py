"""PX against the hand example, the explicit list of paths, and its promises."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

from fxprune import methods
from fxprune.methods import Problem, Scores
from fxprune.paths.count import reach
from fxprune.sparsity.masks import Masks, total
from methods.problems import TOY_A_DATA, toy_a
from methods.px.problems import X, activities, mlp, px_problem

F = nn.functional


def test_toy_a(scored: list[Scores]) -> None:
    # Both units are active, x^2 = (4, 1): the output has 5 + 5, times SynFlow-L2's 1 1 16 4 | 2 20.
    asked = px_problem(toy_a(), TOY_A_DATA)
    assert activities(asked)[0].tolist() == [10.0]
    methods.get("px", rounds=1).find(asked)
    found = torch.cat([score.flatten() for score in scored[0].values()])
    expected = torch.tensor([10.0, 10.0, 160.0, 40.0, 20.0, 200.0])
    assert torch.allclose(found / found.sum(), expected / expected.sum())


def listed(net: nn.Sequential, masks: Masks) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Activity of every output and the scores, path by path, from the formula of the paper."""
    weights = [net[i].weight.detach() * masks[f"{i}.weight"] for i in (0, 2, 4)]
    first = F.linear(X, weights[0], net[0].bias)
    second = F.linear(first.relu(), weights[1], net[2].bias)
    patterns = [(first > 0).double(), (second > 0).double()]
    activity = torch.zeros(3, dtype=torch.float64)
    for i, j, k, out in product(range(3), range(4), range(5), range(3)):
        kept = masks["0.weight"][j, i] & masks["2.weight"][k, j] & masks["4.weight"][out, k]
        if kept:
            activity[out] += (X[:, i].double() ** 2 * patterns[0][:, j] * patterns[1][:, k]).sum()
    scores = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    for i, j, k, out in product(range(3), range(4), range(5), range(3)):
        places = ((j, i), (k, j), (out, k))
        value = activity[out]
        for weight, place in zip(weights, places, strict=True):
            value = value * weight[place].double() ** 2
        for score, place in zip(scores, places, strict=True):
            score[place] += value
    return activity, dict(zip(("0.weight", "2.weight", "4.weight"), scores, strict=True))


@pytest.mark.parametrize("pruned", [False, True])
def test_against_the_list_of_all_paths(scored: list[Scores], pruned: bool) -> None:
    net = mlp()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    if pruned:
        masks["4.weight"][[0, 1, 1], [0, 2, 3]] = False
        masks["0.weight"][2, 1] = False
    asked = px_problem(net, (X, torch.zeros(6)), masks=masks)
    activity, expected = listed(net, masks)
    assert torch.allclose(activities(asked)[0], activity)
    assert (len(activity.unique()) == 1) != pruned, "outputs differ once the classifier is pruned"
    methods.get("px", rounds=1).find(asked)
    whole = sum(score.sum() for score in expected.values())
    found = sum(score.double().sum() for score in scored[0].values())
    for name, score in expected.items():
        assert torch.allclose(scored[0][name].double() / found, score / whole, rtol=1e-4, atol=1e-9)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("net", one_in(2, NETS))
def test_any_network(net: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = methods.get("px", rounds=3, resolution="channel").find(
        px_problem(model, [(inputs, torch.zeros(1))], 0.6)
    )
    size = sum(mask.numel() for mask in masks.values())
    assert total(masks) == int(size * 0.4 + 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
def test_no_layer_collapses_in_a_hundred_rounds(scored: list[Scores]) -> None:
    torch.manual_seed(0)
    layers = [
        layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    data = (torch.randn(8, 3, 8, 8), torch.arange(8))
    masks = methods.get("px", resolution="channel").find(px_problem(net, data, 0.982))
    assert all(mask.any() for mask in masks.values())
    assert len(scored) == 100
    for scores, later in pairwise(scored):
        assert all(bool((score >= 0).all()) for score in scores.values())
        assert sum(int((score > 0).sum()) for score in later.values()) > 0
    assert all(bool((score > 0).all()) for score in scored[0].values())


class Residual(nn.Module):
    """Three residual branches that carry next to nothing, one of them already pruned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        with torch.no_grad():
            for branch in self.branches:
                branch.weight.mul_(1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x).relu()
        return self.last(x)


@pytest.mark.slow
def test_branches_that_a_skip_passes_keep_a_path() -> None:
    # All paths cross the first and the last layer; the sum of scores of a branch may fall to nothing.
    asked = px_problem(Residual(), (X, torch.zeros(6)), 0.9)
    asked.masks["branches.1.weight"][:] = False
    masks = methods.get("px").find(asked)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(kept.values()) == asked.budget.total == 14
    assert (kept["branches.0.weight"], kept["branches.1.weight"], kept["branches.2.weight"]) == (1, 0, 1)
    on_path = reach(asked.graph, masks)
    assert on_path["branches.0.weight"].any()
    assert on_path["branches.2.weight"].any()
    untouched = methods.get("px").find(replace(asked, invert=True))
    assert total(untouched) == 14


@pytest.mark.slow
def test_a_budget_that_is_too_small_for_every_branch() -> None:
    asked = px_problem(Residual(), (X, torch.zeros(6)), 0.98)
    masks = methods.get("px").find(asked)
    assert total(masks) == asked.budget.total == 3
    assert reach(asked.graph, masks)["last.weight"].any()


def test_a_dense_classifier_needs_no_pass() -> None:
    net = mlp()
    passes: list[int] = []
    asked = px_problem(net, (X, torch.zeros(6)))
    asked.model.register_forward_hook(lambda *_: passes.append(1))
    methods.get("px", rounds=1).find(asked)
    assert not passes
    methods.get("px", rounds=4).find(asked)
    assert passes


def test_mapping_batches() -> None:
    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).sum()

    pair = px_problem(mlp(), (X, torch.zeros(6)))
    found = methods.get("px", rounds=2).find(pair)
    gm = pair.model
    mapped = Problem(
        model=gm, graph=pair.graph, weights=pair.weights, masks=pair.masks, budget=pair.budget, data={"x": X},
        loss_fn=loss_fn,
    )  # fmt: skip
    again = methods.get("px", rounds=2).find(mapped)
    assert all(torch.equal(found[name], again[name]) for name in found)
