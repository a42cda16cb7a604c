"""The local search: exact counts after every move, the best is restored, restarts."""

import math

import numpy as np
import pytest
import torch

from fxprune.channels.counts import count_kernels, count_nodes
from fxprune.methods.balance.coordinate_ascent import CoordinateAscent
from fxprune.methods.balance.local_search import LocalSearch
from fxprune.methods.balance.target import Target
from fxprune.methods.dpai.objective import Figures
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow, reach
from methods.balance.networks import parts, small
from methods.problems import asked


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
