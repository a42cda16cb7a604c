"""Coordinate ascent: every layer ends at its best choice, given the others."""

import numpy as np
import pytest
import torch
from nets import NETS

from fxprune.methods.balance.coordinate_ascent import CoordinateAscent, fill_in_order
from fxprune.paths.circuit.compile import circuit
from methods.balance.networks import parts
from methods.problems import asked


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


def test_weights_fill_places_in_order() -> None:
    assert fill_in_order(np.array([2.0, 1.0, 3.0, 4.0]), 5).tolist() == [2, 1, 2, 0]
