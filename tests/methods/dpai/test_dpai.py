"""DPaI as a method: its figures against the metrics, its budgets, options, schedules and warnings."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from nets import NETS, lowered_net
from thinning import one_in
from torch import nn

import fxprune
from fxprune import methods, zoo
from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.dpai import adam_topk, layer_topk
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import Objective
from fxprune.metrics import measure
from fxprune.sparsity.masks import Masks, is_subset, kept
from methods.dpai.ascents import OBJECTIVES, ascent_at, dense_weights
from methods.problems import problem


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("name", "objective"),
    one_in(3, ["mlp", "attention", "mixer", "glu_free", "vit"], OBJECTIVES),
)
def test_layers_that_are_listed_end_as_those_that_are_not(
    name: str, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = lowered_net(name)
    found: list[tuple[Masks, dict[str, list[float]]]] = []
    for rare in (0, 1):
        asked = problem(nn.Identity(), 0.5, graph=graph, only=dense_weights(graph), seed=4)
        monkeypatch.setattr(layer_topk, "INDEX_RATIO", rare or 10**9)
        monkeypatch.setattr(adam_topk, "GROUP_ENTRIES", 1)
        alpha, beta = objective.alpha, objective.beta
        masks = methods.get("dpai", alpha=alpha, beta=beta, steps=40).find(asked)
        found.append((masks, asked.history))
    ascent = ascent_at(graph, found[1][0], objective, "kernel")
    ascent.figures()
    assert isinstance(ascent.gradients, KernelGradients)
    assert ascent.gradients.kept_lists
    (masks, history), (others, other_history) = found
    assert all(torch.equal(masks[label], others[label]) for label in masks)
    for column, values in history.items():
        assert other_history[column] == pytest.approx(values)


@pytest.mark.parametrize(("name", "resolution"), one_in(2, NETS, ["channel", "spatial"]))
def test_every_network_at_both_resolutions(name: str, resolution: Any) -> None:
    graph = lowered_net(name)
    asked = problem(nn.Identity(), 0.5, graph=graph, only=dense_weights(graph))
    found = methods.get("dpai", steps=12, resolution=resolution).find(asked)
    history = asked.history
    report = measure(graph, found, resolution)
    assert report.kept_params == asked.budget.total
    assert history["log_paths"][-1] == pytest.approx(report.log_paths, abs=1e-4)
    assert history["nodes"][-1] == report.effective_nodes
    assert history["kernels"][-1] == report.effective_kernels


@pytest.fixture(scope="module")
def small() -> ChannelGraph:
    return lower(capture(zoo.resnet20(), torch.ones(1, 3, 32, 32)))


def ask(graph: ChannelGraph, kept_weights: int = 865, **fields: Any) -> Problem:
    return problem(nn.Identity(), 1 - kept_weights / graph.prunable, graph=graph, only=dense_weights(graph),
                   **fields)  # fmt: skip


@pytest.mark.slow
def test_each_objective_grows(small: ChannelGraph) -> None:
    for options, column, least in (
        ({"alpha": 0.0}, "log_paths", 35),
        ({"alpha": 1.0, "beta": 0.0}, "nodes", 540),
        ({"alpha": 1.0, "beta": 1.0}, "kernels", 800),
    ):
        asked = ask(small)
        masks = methods.get("dpai", steps=400, **options).find(asked)
        report = measure(small, masks)
        figures = {
            "log_paths": report.log_paths,
            "nodes": report.effective_nodes,
            "kernels": report.effective_kernels,
        }
        assert report.kept_params == 865
        assert figures[column] > least
        assert asked.history[column][-1] > asked.history[column][0]


def test_weights_do_not_matter_and_seeds_do() -> None:
    torch.manual_seed(0)
    found = []
    for seed in (1, 1, 2):
        net, example = NETS["residual"]()  # drawn anew
        pruned = fxprune.apply(net, "dpai", 0.7, example_inputs=example, seed=seed, steps=30, progress=False)
        found.append(torch.cat([mask.flatten() for mask in fxprune.masks(pruned).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
def test_budgets(small: ChannelGraph) -> None:
    sizes = {name: own.shape.numel() for name, own in small.kernels.items()}
    for budget in ("erk", "uniform", {"*": 0.99}):
        asked = ask(small, 2709, budget=budget)
        assert kept(methods.get("dpai", steps=2).find(asked)) == asked.budget.layers
    by_erk = kept(methods.get("dpai", steps=2).find(ask(small, 2709)))
    assert by_erk == ask(small, 2709, budget="erk").budget.layers
    printed = kept(methods.get("dpai", steps=2, allocation="equation15").find(ask(small, 27_090)))
    assert sum(printed.values()) == 27_090
    # Sparsities are in proportion to 1 - sum / product of dims, up to rounding.
    constants = [
        (1 - number / sizes[name]) / (1 - sum(small.kernels[name].shape) / sizes[name])
        for name, number in printed.items()
        if number < sizes[name]
    ]
    assert max(constants) - min(constants) < 2e-3


def test_pruned_weights_stay_pruned_and_excluded_layers_as_they_are() -> None:
    torch.manual_seed(0)
    net, example = NETS["residual"]()
    first = fxprune.apply(net, "dpai", 0.4, example_inputs=example, steps=20, progress=False)
    before = fxprune.masks(first)
    excluded = next(iter(before))
    again = fxprune.apply(
        first, "dpai", 0.75, example_inputs=example, exclude=excluded, steps=20, progress=False
    )
    after = fxprune.masks(again)
    assert is_subset(after, before)
    assert torch.equal(after[excluded], before[excluded])
    # The excluded layer counts with the masks it has.
    history = again.meta["fxprune"]["history"]
    paths = measure(lower(capture(net, example)), after, "channel").log_paths
    assert history["log_paths"][-1] == pytest.approx(paths, abs=1e-9)


def test_history_is_on_the_result() -> None:
    torch.manual_seed(0)
    net, example = NETS["conv_chain"]()
    pruned = fxprune.apply(net, "dpai", 0.6, example_inputs=example, steps=25, progress=False)
    history = pruned.meta["fxprune"]["history"]
    assert list(history) == ["step", "log_paths", "nodes", "kernels", "objective"]
    assert history["step"] == [0, 10, 20, 25]
    expected = 0.01 * history["log_paths"][-1] + 0.495 * math.log(
        history["nodes"][-1] * history["kernels"][-1]
    )
    assert history["objective"][-1] == pytest.approx(expected)


@pytest.mark.slow
def test_it_stops_when_nothing_changes() -> None:
    torch.manual_seed(0)
    net, example = NETS["mlp"]()
    graph = lower(capture(net, example))
    steps = {}
    for tol in (1e6, 2e-3, 0.0):
        asked = problem(net, 0.5, graph=graph)
        methods.get("dpai", steps=700, tol=tol).find(asked)
        steps[tol] = asked.history["step"][-1]
    assert steps[1e6] == 600  # two stretches of 300 are compared
    assert steps[1e6] <= steps[2e-3] <= 700
    assert steps[0.0] == 700


@pytest.mark.slow
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_first_path_is_found_where_the_random_masks_have_none(
    is_listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_listed:
        monkeypatch.setattr(layer_topk, "INDEX_RATIO", 1)
        monkeypatch.setattr(adam_topk, "GROUP_ENTRIES", 1)
    deep = nn.Sequential(*(nn.Linear(12, 12) for _ in range(10)))
    graph = lower(capture(deep, torch.ones(1, 12)))
    asked = problem(deep, 1 - 40 / graph.prunable, graph=graph, budget="uniform")
    masks = methods.get("dpai", steps=500, alpha=0.5, beta=0.5).find(asked)
    assert asked.history["log_paths"][0] == -math.inf
    assert measure(graph, masks).log_paths > -math.inf


@pytest.mark.parametrize("resolution", ["channel", "spatial"])
def test_no_path_is_a_warning_with_the_budget_it_takes(small: ChannelGraph, resolution: str) -> None:
    chain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    graph = lower(capture(chain, torch.ones(1, 6)))
    with pytest.warns(UserWarning, match=r"keeps 4 of 216 weights, .* takes 6 at least \(sparsity <= 0.972"):
        methods.get("dpai", steps=3, resolution=resolution).find(problem(chain, 1 - 4 / 216, graph=graph))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods.get("dpai", steps=3).find(ask(small))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, r"alpha=1.5, expected a number in \[0, 1\]"),
        ({"beta": -0.1}, r"beta=-0.1, expected a number in \[0, 1\]"),
        ({"alpha": math.nan}, r"alpha=nan"),
        ({"steps": 0}, "steps=0, expected an integer of at least 1"),
        ({"lr": 0.0}, "lr=0.0, expected a number above 0"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"resolution": "pixel"}, "resolution='pixel', expected one of 'channel', 'spatial'"),
        ({"allocation": "equation14"}, "allocation='equation14'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"method 'dpai': {words}"):
        methods.get("dpai", **options)


def test_inverting_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="has no scores to invert"):
        methods.get("dpai", invert=True)


def test_the_bar_shows_what_grows_and_an_interrupt_comes_through(small: ChannelGraph) -> None:
    said: list[str] = []

    def progress(steps: Iterable[Any], description: Any, total: int) -> Iterable[Any]:
        assert total == 6
        for place, step in enumerate(steps):
            if place == 3:
                raise KeyboardInterrupt
            yield step
            said.append(description())

    asked = ask(small, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        methods.get("dpai", steps=60).find(asked)
    assert len(said) == 3
    assert all(text.startswith("dpai: ln paths ") and text.endswith(" kernels") for text in said)
    assert all(bool(mask.all()) for mask in asked.masks.values())


@pytest.mark.thinned(4)
@pytest.mark.filterwarnings("ignore:sparsity=0.7. more than the 0.5 of 2.4")
@pytest.mark.parametrize("granularity", ["kernel", "nm(2,4)", "block(2,2)"])
@pytest.mark.parametrize("schedule", [None, "linear(3)", "exponential(4)"])
def test_granularities_and_schedules(granularity: str, schedule: str | None) -> None:
    torch.manual_seed(0)
    net, example = NETS["conv_chain"]()
    pruned = fxprune.apply(
        net, "dpai", 0.7, example_inputs=example, granularity=granularity, schedule=schedule, steps=30,
        progress=False,
    )  # fmt: skip
    plain = fxprune.apply(net, "random", 0.7, example_inputs=example, budget="erk", granularity=granularity)
    masks = fxprune.masks(pruned)
    assert kept(masks) == kept(fxprune.masks(plain))
    if granularity == "kernel":
        convs = [mask.flatten(2) for mask in masks.values() if mask.dim() > 2]
        assert all(torch.equal(mask.any(2), mask.all(2)) for mask in convs)


def test_a_schedule_of_single_weights_reaches_the_budget(small: ChannelGraph) -> None:
    asked = ask(small, schedule="cubic(5)")
    masks = methods.get("dpai", steps=50).find(asked)
    assert sum(kept(masks).values()) == 865
    assert asked.history["kernels"][0] > 865  # denser at first
