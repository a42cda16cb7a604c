"""Balance: exact counts, layer budgets, and results above DPaI's in nodes, kernels and paths at once."""

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

from fxprune import methods, zoo
from fxprune.paths.circuit import compile as circuits
from fxprune.sparsity.masks import is_subset, kept, total
from methods.balance.networks import figures, small
from methods.problems import asked


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_not_below_dpai_in_any_figure(alpha: float, beta: float) -> None:
    torch.manual_seed(0)
    net, inputs = small()
    found = {}
    for name, options in (("dpai", {"steps": 600, "lr": 0.025, "tol": 0.0}), ("balance", {"steps": 1200})):
        question = asked(net, inputs, 0.97, budget="erk")
        masks = methods.get(name, alpha=alpha, beta=beta, **options).find(question)
        assert kept(masks) == question.budget.layers
        found[name] = figures(question, masks)
    nodes, kernels, paths = found["balance"]
    assert nodes >= found["dpai"][0]
    assert kernels >= found["dpai"][1]
    assert paths >= found["dpai"][2] - (0.3 if alpha >= 0.5 else 0.0)  # taps are drawn at random there


@pytest.mark.slow
def test_resnet20_at_865_weights() -> None:
    # The published optimiser ends at 549 nodes, 717 kernels, ln paths 16.90 (issue 4, counted exactly).
    net = zoo.resnet20()
    question = asked(net, torch.ones(1, 3, 32, 32), 1 - 865 / 270896, budget="erk")
    masks = methods.get("balance", alpha=1.0, beta=0.0, steps=1000).find(question)
    nodes, kernels, paths = figures(question, masks)
    assert nodes >= 590
    assert kernels >= 750
    assert paths >= 25
    assert question.history["nodes"][-1] == nodes
    assert len({len(column) for column in question.history.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "alpha"),
    one_in(
        2, ["projection", "dense", "grouped", "depthwise", "transposed", "vit", "glu", "tied"], [0.0, 0.99]
    ),
)
def test_any_network_keeps_its_budget(net: str, alpha: float) -> None:
    torch.manual_seed(0)
    question = asked(*NETS[net](), 0.7)
    masks = methods.get("balance", alpha=alpha, steps=60).find(question)
    assert total(masks) == question.budget.total
    fewer = asked(*NETS[net](), 0.8, masks=masks)
    again = methods.get("balance", alpha=alpha, steps=60).find(fewer)
    assert is_subset(again, masks)
    assert total(again) == fewer.budget.total


@pytest.mark.slow
def test_taps_on_paths_are_central_and_have_more_paths() -> None:
    torch.manual_seed(0)
    net, inputs = small()
    found = {}
    for taps in ("random", "paths"):
        question = asked(net, inputs, 0.95, budget="erk")
        masks = methods.get("balance", alpha=1.0, beta=1.0, steps=300, taps=taps).find(question)
        found[taps] = figures(question, masks)[2]
    assert found["paths"] > found["random"]


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"beta": 2.0}, {"steps": 0}])
def test_bad_options(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"method 'balance': {name}="):
        methods.get("balance", **options)


@pytest.mark.slow
def test_paths_of_resnet20_at_865_weights() -> None:
    # DPaI ends at 59.4, the local search alone at 60.1 (docs/balance.md).
    question = asked(zoo.resnet20(), torch.ones(1, 3, 32, 32), 1 - 865 / 270896, budget="erk")
    masks = methods.get("balance", alpha=0.0, beta=0.0).find(question)
    nodes, kernels, paths = figures(question, masks)
    assert paths >= 60.15
    assert nodes >= 65
    assert kernels >= 165
    assert len({len(column) for column in question.history.values()}) == 1
    assert (question.history["nodes"][-1], question.history["kernels"][-1]) == (nodes, kernels)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("steps", [60, 120, 240])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 1.0), (0.9, 0.5)])
def test_nodes_of_small_images_live_position_by_position(alpha: float, beta: float, steps: int) -> None:
    """On 2 x 2 pixels two corner taps in a row lead nowhere: what the channels have, positions have too."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(12, 12, 3, padding=1, bias=False) for _ in range(6)))
    question = asked(net, torch.ones(1, 12, 2, 2), 0.98, budget="uniform")
    masks = methods.get("balance", alpha=alpha, beta=beta, steps=steps).find(question)
    assert figures(question, masks)[:2] == (question.history["nodes"][-1], question.history["kernels"][-1])


def test_networks_that_are_counted_in_float32_have_restarts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuits, "WIDE", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 5))
    question = asked(net, torch.ones(1, 20), 0.9, budget="uniform")
    masks = methods.get("balance", alpha=0.0, steps=200).find(question)
    assert kept(masks) == question.budget.layers
    assert figures(question, masks)[2] == pytest.approx(question.history["log_paths"][-1], abs=1e-4)
