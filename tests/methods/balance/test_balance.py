"""Balance: exact counts, layer budgets, and results above DPaI's in nodes, kernels and paths at once."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

from fxprune import methods, zoo
from fxprune.capture import capture
from fxprune.channels.counts import count_kernels, count_nodes
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.balance.coordinate_ascent import CoordinateAscent, fill_in_order
from fxprune.methods.balance.layer_moves import cover_channels, fill_by_gain
from fxprune.methods.balance.local_search import LocalSearch
from fxprune.methods.balance.tap_refinement import TapRefinement
from fxprune.methods.balance.target import Target
from fxprune.methods.dpai.objective import Figures
from fxprune.paths.circuit import compile as circuits
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow, reach
from fxprune.sparsity.masks import Masks, is_subset, kept, total
from methods.problems import problem


def asked(model: nn.Module, inputs: Any, sparsity: float, **fields: Any) -> Problem:
    gm = capture(model, inputs)
    graph = lower(gm)
    only = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    return problem(gm, sparsity, graph=graph, only=only, **fields)


def small() -> tuple[nn.Module, torch.Tensor]:
    """A chain of four convolutions and a head, 12 channels wide."""
    convs = [nn.Conv2d(a, 12, 3, padding=1, bias=False) for a in (3, 12, 12, 12)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5, bias=False))
    return net, torch.ones(1, 3, 8, 8)


def figures(question: Problem, masks: Masks) -> tuple[int, int, float]:
    """Effective nodes and kernels, and ln paths, at spatial resolution."""
    effective = reach(question.graph, masks)
    edges = {name: mask.double() for name, mask in masks.items()}
    return (
        sum(count_nodes(question.graph.kernels[name], mask) for name, mask in effective.items()),
        sum(count_kernels(mask) for mask in effective.values()),
        flow(question.graph, edges, dtype=torch.float64).log_total,
    )


@pytest.mark.parametrize("seed", range(4))
def test_filling_by_gain_is_optimal_by_enumeration(seed: int) -> None:
    random = np.random.default_rng(seed)
    gain = random.random((1, 3, 2))
    cap = random.integers(1, 3, (1, 3, 2)).astype(float)
    covered = np.zeros(gain.shape, dtype=bool)
    covered[0, 2, 1] = True
    found = fill_by_gain(covered, gain, cap, 5, path_weight=1.0, kernel_bonus=seed / 4)

    def worth(counts: np.ndarray) -> float:
        return float((counts * gain).sum() * (1 + 1e-6) + seed / 4 * (counts > 0).sum())

    best = -math.inf
    for values in itertools.product(*[range(int(c) + 1) for c in cap.ravel()]):
        counts = np.array(values, dtype=float).reshape(gain.shape)
        if counts.sum() == 5 and counts[0, 2, 1] >= 1:
            best = max(best, worth(counts))
    assert found.sum() == 5
    assert worth(found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_filling_a_large_layer_is_taking_weights_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    gain = random.integers(0, 4, (2, 30, 20)).astype(float)  # with ties, and kernels on no path
    cap = random.integers(0, 4, gain.shape).astype(float)
    covered = (random.random(gain.shape) < 0.01) & (cap > 0)
    number = int(covered.sum()) + 400 * (seed % 2) + 30
    found = fill_by_gain(covered, gain, cap, number, path_weight=1.0, kernel_bonus=1.0)

    naive = covered.astype(float)
    for _ in range(number - int(covered.sum())):
        worth = gain * (1 + 1e-6) + (naive == 0) * (gain > 0)
        worth[naive >= cap] = -1.0
        # Ties go to first weights of kernels, in order, then to kernels that have been begun.
        tied = worth.ravel() == worth.max()
        first = np.flatnonzero(tied & (naive.ravel() == 0))
        naive.ravel()[first[0] if len(first) else np.flatnonzero(tied)[0]] += 1
    assert (found == naive).all()


def test_covers_touch_all_that_is_asked_with_as_few_kernels_as_can_be() -> None:
    random = np.random.default_rng(0)
    gain = random.random((2, 5, 4))
    inputs, outputs = random.random((2, 4)) < 0.7, random.random((2, 5)) < 0.7
    chosen = cover_channels(inputs, outputs, gain, np.ones(gain.shape), 20, random)
    assert bool((chosen.any(1) | ~inputs).all())
    assert bool((chosen.any(2) | ~outputs).all())
    for group in range(2):
        assert chosen[group].sum() <= max(inputs[group].sum(), outputs[group].sum())
    fewer = cover_channels(inputs, outputs, gain, np.ones(gain.shape), 3, random)
    assert fewer.sum() == 3


def test_every_count_of_the_search_is_exact() -> None:
    torch.manual_seed(0)
    net, inputs = small()
    question = asked(net, inputs, 0.9)
    found = circuit(question.graph)
    assert found is not None
    caps = {name: found.dense(name) for name in found.kernels}
    generator = torch.Generator().manual_seed(0)
    counts = {n: (torch.rand(c.shape, generator=generator) < 0.3).double() for n, c in caps.items()}
    search = LocalSearch(found, counts, caps, {}, Target((0.5, 1.0, 0.5), Figures(0.0, 1, 1)), generator)
    values = [search.value]
    for _ in range(150):
        better = search.try_move()
        values.append(search.value)
        assert better == (values[-1] > values[-2])
    assert values[-1] > values[0]
    for name, count in search.counts.items():
        assert float(count.sum()) == float(counts[name].sum())
        assert bool((count <= caps[name]).all())
    # As masks, on a periodic image; each kernel has that many taps.
    masks = {
        name: (torch.arange(math.prod(k.shape[2:])) < search.counts[name].unsqueeze(2)).view(k.shape)
        for name, k in question.graph.kernels.items()
    }
    edges = {name: mask.double() for name, mask in masks.items()}
    expected = flow(question.graph, edges, resolution="channel", dtype=torch.float64).log_total
    assert search.figures.log_paths == pytest.approx(expected, abs=1e-9)
    effective = reach(question.graph, masks, resolution="channel")
    kernels = question.graph.kernels
    assert search.figures.nodes == sum(count_nodes(kernels[n], mask) for n, mask in effective.items())
    assert search.figures.kernels == sum(count_kernels(mask) for mask in effective.values())


def test_temperature_lets_the_value_fall_and_the_best_is_restored() -> None:
    torch.manual_seed(0)
    net, inputs = small()
    found = circuit(asked(net, inputs, 0.9).graph)
    assert found is not None
    caps = {name: found.dense(name) for name in found.kernels}
    counts = {name: (cap > 0).double() for name, cap in caps.items()}
    generator = torch.Generator().manual_seed(0)
    search = LocalSearch(found, counts, caps, {}, Target((1.0, 0.0, 0.0), Figures(0.0, 1, 1)), generator)
    values = []
    for _ in range(60):
        search.try_move(temperature=5.0)
        values.append(search.value)
    assert min(np.diff(values)) < 0
    search.restore_best()
    assert search.value == max(values)
    run = found.run(search.counts)
    assert run.log_total == search.figures.log_paths


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


def parts() -> tuple[Problem, Any, Masks, dict[str, torch.Tensor]]:
    """A question, its circuit, and counts and caps of a network of four convolutions."""
    torch.manual_seed(0)
    question = asked(*small(), 0.9)
    found = circuit(question.graph)
    assert found is not None
    caps = {name: found.dense(name) for name in found.kernels}
    generator = torch.Generator().manual_seed(0)
    return (
        question,
        found,
        {n: (torch.rand(c.shape, generator=generator) < 0.3).double() for n, c in caps.items()},
        caps,
    )


def test_drawn_counts_are_a_local_optimum_of_every_layer() -> None:
    _, found, counts, caps = parts()
    caps["1.weight"][:6] = 0  # what was pruned before stays so
    counts["1.weight"][:6] = 0
    ascent = CoordinateAscent(found, counts, caps, {}, np.random.default_rng(0))
    values = set()
    for _ in range(3):
        drawn = ascent.draw()
        log_total = found.run(drawn).log_total
        values.add(log_total)
        for name, count in drawn.items():
            assert float(count.sum()) == float(counts[name].sum())
            assert bool((count <= caps[name]).all())
            # R is linear in this layer: the best of all its choices takes the largest slopes.
            run = found.run(drawn)
            (place,) = (i for i, op in enumerate(found.contractions) if op.name == name)
            gain = torch.outer(run.slope[place], run.x[place])
            flat, room = gain.flatten().sort(descending=True).values, caps[name].flatten()
            room = room[gain.flatten().sort(descending=True).indices]
            taken = (count.sum() - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
            assert float((gain * count).sum()) == pytest.approx(1.0, abs=1e-9)
            assert float((flat * taken).sum()) == pytest.approx(1.0, abs=2e-4)
    assert len(values) > 1
    assert min(values) > found.run(counts).log_total + 1


def test_coordinate_ascent_leaves_the_circuit_and_shared_parameters_alone() -> None:
    torch.manual_seed(0)
    question = asked(*NETS["tied"](), 0.7)
    found = circuit(question.graph)
    assert found is not None
    caps = {name: found.dense(name) for name in found.kernels}
    generator = torch.Generator().manual_seed(0)
    counts = {n: (torch.rand(c.shape, generator=generator) < 0.6).double() for n, c in caps.items()}
    before = found.run(counts).log_total
    drawn = CoordinateAscent(found, counts, caps, {}, np.random.default_rng(0)).draw()
    assert found.run(counts).log_total == before
    reads = [op.name for op in found.contractions]
    shared = [name for name in counts if reads.count(name) > 1]
    assert shared
    assert all(torch.equal(drawn[name], counts[name]) for name in shared)


def test_a_restart_is_accepted_only_if_better_and_near_the_floors() -> None:
    _, found, counts, caps = parts()
    drawn = CoordinateAscent(found, counts, caps, {}, np.random.default_rng(0)).draw()
    for floor, expected in ((Figures(0.0, 1, 1), True), (Figures(0.0, 1, 10**4), False)):
        search = LocalSearch(
            found, counts, caps, {}, Target((1.0, 0.0, 0.0), floor), torch.Generator().manual_seed(0)
        )
        before = search.figures
        is_taken, offered = search.restart_if_better(drawn)
        assert is_taken is expected
        assert (search.figures != before) is expected
        assert search.restart_if_better(counts)[0] is False
        search.restart_from(drawn)
        assert search.figures == offered
        search.restart_from(counts)
        search.restore_best()
        assert (search.figures != before) is expected


def test_refinement_finds_the_best_taps_of_a_layer_by_enumeration() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(2, 1, 3, padding=1, bias=False))
    question = asked(net, torch.ones(1, 1, 3, 3), 0.5)
    usable = {name: torch.ones(k.shape, dtype=torch.bool) for name, k in question.graph.kernels.items()}
    masks = {name: torch.zeros_like(mask) for name, mask in usable.items()}
    masks["0.weight"][:, 0, 0, :2] = True  # two pairs of taps at the upper border
    masks["1.weight"][:] = True
    del usable["1.weight"], masks["1.weight"]
    refinement = TapRefinement(
        question.graph, usable, {}, Target((1.0, 0.0, 0.0), Figures(0.0, 1, 1)), np.random.default_rng(0)
    )
    found = refinement.refine(masks)
    best = -math.inf
    for chosen in itertools.combinations(range(18), 4):
        trial = torch.zeros(18)
        trial[list(chosen)] = 1
        if trial.view(2, 9).any(1).all():  # both channels stay in use
            best = max(best, flow(question.graph, {"0.weight": trial.view(2, 1, 3, 3)}).log_total)
    edges = {"0.weight": found["0.weight"].double()}
    assert found["0.weight"].sum() == 4
    assert flow(question.graph, edges, dtype=torch.float64).log_total == pytest.approx(best, abs=1e-5)


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


@pytest.mark.parametrize("steps", [60, 120, 240])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 1.0), (0.9, 0.5)])
def test_nodes_of_small_images_live_position_by_position(alpha: float, beta: float, steps: int) -> None:
    """On 2 x 2 pixels two corner taps in a row lead nowhere: what the channels have, positions have too."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(12, 12, 3, padding=1, bias=False) for _ in range(6)))
    question = asked(net, torch.ones(1, 12, 2, 2), 0.98, budget="uniform")
    masks = methods.get("balance", alpha=alpha, beta=beta, steps=steps).find(question)
    assert figures(question, masks)[:2] == (question.history["nodes"][-1], question.history["kernels"][-1])


def test_no_gain_makes_up_for_a_node_below_the_least() -> None:
    """Of 5000 nodes one is a 5000th; a floor of kernels out of reach must not buy it."""
    start = Figures(60.0, 5000, 100_000)
    target = Target((1e-3, 1.0, 1e-3), Figures(61.0, 5250, 102_000), start)
    assert target.value(start) > target.value(Figures(90.0, 4999, 110_000))
    assert target.value(start) > target.value(Figures(90.0, 5100, 99_999))
    assert target.value(Figures(60.0, 5000, 100_001)) > target.value(start)


def test_a_search_goes_back_to_its_start_where_all_else_was_worse() -> None:
    """The best is that since the target was set, the start included, and not the last that was kept."""
    _, found, counts, caps = parts()
    best = CoordinateAscent(found, counts, caps, {}, np.random.default_rng(0)).draw()
    target = Target((1.0, 0.0, 0.0), Figures(0.0, 1, 1))
    search = LocalSearch(found, best, caps, {}, target, torch.Generator().manual_seed(0))
    start = search.value
    for _ in range(20):
        search.try_move(temperature=50.0)
        search.restart_from(counts)
    assert search.value < start
    search.restore_best()
    assert search.value >= start
    assert found.run(search.counts).log_total == search.figures.log_paths


def test_a_move_that_is_not_kept_leaves_the_counts_alone() -> None:
    _, found, counts, caps = parts()
    target = Target((1.0, 1.0, 1.0), Figures(0.0, 1, 1))
    search = LocalSearch(found, counts, caps, {}, target, torch.Generator().manual_seed(0))
    for _ in range(60):
        search.try_move()
        run = found.run(search.counts)
        assert run.log_total == search.figures.log_paths


def test_networks_that_are_counted_in_float32_have_restarts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuits, "WIDE", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 5))
    question = asked(net, torch.ones(1, 20), 0.9, budget="uniform")
    masks = methods.get("balance", alpha=0.0, steps=200).find(question)
    assert kept(masks) == question.budget.layers
    assert figures(question, masks)[2] == pytest.approx(question.history["log_paths"][-1], abs=1e-4)


def test_weights_fill_places_in_order() -> None:
    assert fill_in_order(np.array([2.0, 1.0, 3.0, 4.0]), 5).tolist() == [2, 1, 2, 0]
