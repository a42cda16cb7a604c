"""NPB against an integer solver, and its incoming paths against the eager network."""

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import methods
from fxprune.paths.count import reach
from fxprune.sparsity.masks import is_subset, kept
from methods.npb.networks import asked


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "net", ["residual", "projection", "dense", "grouped", "excite_sigmoid", "vit", "mixer"]
)
@pytest.mark.parametrize("alpha", [0.01, 0.99])
def test_every_layer_keeps_its_budget_and_repair_only_helps(net: str, alpha: float) -> None:
    _, _, question = asked(net, 0.7, budget="erk")
    plain = methods.get("npb", alpha=alpha, repair=False).find(question)
    _, _, again = asked(net, 0.7, budget="erk")
    masks = methods.get("npb", alpha=alpha).find(again)
    assert kept(masks) == kept(plain) == question.budget.layers
    before, after = (reach(question.graph, found) for found in (plain, masks))
    assert is_subset(before, after)


def test_more_nodes_than_random_masks_and_no_weight_wasted() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in ((3, 16), (16, 16), (16, 16))]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10, bias=False))
    example = torch.ones(1, 3, 8, 8)
    nodes = {}
    for method in ("npb", "random"):
        pruned = fxprune.apply(
            net, method, 0.985, example_inputs=example, budget="erk", progress=False, on_collapse="repair"
        )
        report = fxprune.analyze(pruned, example_inputs=example)
        nodes[method] = report.effective_nodes
        if method == "npb":
            assert report.effective_params == report.kept_params
    assert nodes["npb"] > 1.3 * nodes["random"]


def test_weights_pruned_before_stay_pruned_and_the_largest_are_taken_inside_a_kernel() -> None:
    _, _, first = asked("conv_free", 0.0)
    generator = torch.Generator().manual_seed(2)
    start = {n: torch.rand(w.shape, generator=generator) < 0.6 for n, w in first.weights.items()}
    _, _, question = asked("conv_free", 0.7, masks=start)
    masks = methods.get("npb").find(question)
    assert is_subset(masks, start)
    assert sum(kept(masks).values()) == question.budget.total
    largest = methods.get("npb", inside="magnitude", repair=False).find(asked("conv_free", 0.7)[2])
    for name, mask in largest.items():
        size = question.weights[name].abs().flatten(2)
        chosen = mask.flatten(2)
        worst_in = size.where(chosen, torch.inf).amin(2)
        best_out = size.where(~chosen, -torch.inf).amax(2)
        assert bool((worst_in >= best_out)[chosen.any(2)].all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5, expected a number from 0 to 1"),
        ({"beta": -1.0}, "beta=-1.0, expected a number of at least 0"),
        ({"max_per_kernel": 0}, "max_per_kernel=0, expected an integer"),
        ({"min_per_node": 0}, "min_per_node=0, expected an integer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.get("npb", **options)
