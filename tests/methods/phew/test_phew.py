"""PHEW's walks against probabilities worked out by hand, and against paths found by `reach`."""

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

import fxprune
from fxprune import methods
from fxprune.paths.count import reach
from fxprune.sparsity.masks import is_subset, kept, total
from methods.phew.walking import PLAIN, both, walks_of
from methods.problems import asked


@pytest.mark.parametrize("net", one_in(2, sorted(NETS)))
def test_every_network_can_be_walked_and_keeps_the_budget(net: str) -> None:
    torch.manual_seed(0)
    question = asked(*NETS[net](), 0.8)
    for visits in both(walks_of(question), 50):
        assert len(visits.complete) == 50
    masks = methods.get("phew").find(question)
    assert total(masks) == question.budget.total
    effective = reach(question.graph, masks, resolution="channel")
    if net in PLAIN:
        assert total(effective) == total(masks)


def test_large_weights_are_preferred_and_whole_kernels_kept_when_asked() -> None:
    torch.manual_seed(0)
    net, inputs = NETS["conv_chain"]()
    question = asked(net, inputs, 0.8)
    masks = methods.get("phew").find(question)
    for name, weight in question.weights.items():
        assert float(weight[masks[name]].abs().mean()) > 1.2 * float(weight[~masks[name]].abs().mean())
    whole = methods.get("phew", kernel=True).find(asked(net, inputs, 0.8))
    full = [sum(int((m.flatten(2).sum(2) == 9).sum()) for m in found.values()) for found in (masks, whole)]
    assert full[1] >= 20 > 5 > full[0]
    assert total(whole) == total(masks)


@pytest.mark.parametrize("sparsity", [0.02, 0.3])
def test_low_sparsities_end(sparsity: float) -> None:
    torch.manual_seed(0)
    net, inputs = NETS["projection"]()
    with torch.no_grad():
        next(net.parameters())[:, 0] = 0.0  # no walk prefers these
    question = asked(net, inputs, sparsity)
    assert total(methods.get("phew").find(question)) == question.budget.total


def test_budgets_by_layer_and_masks_before() -> None:
    torch.manual_seed(0)
    net, inputs = NETS["dense"]()
    question = asked(net, inputs, 0.7, budget="erk")
    masks = methods.get("phew").find(question)
    assert kept(masks) == question.budget.layers
    again = asked(net, inputs, 0.8, masks=masks)
    fewer = methods.get("phew").find(again)
    assert is_subset(fewer, masks)
    assert total(fewer) == again.budget.total


def test_nothing_collapses_at_extreme_sparsity_and_no_weight_is_wasted() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(a, 12, 3, padding=1, bias=False) for a in (3, 12, 12, 12, 12)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5, bias=False))
    example = torch.ones(1, 3, 8, 8)
    report = fxprune.analyze(
        fxprune.apply(net, "phew", 0.99, example_inputs=example, progress=False), example_inputs=example
    )
    assert report.kept_params == report.effective_params
