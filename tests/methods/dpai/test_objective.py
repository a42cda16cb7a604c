"""Directions of scores under each objective, computed by hand."""

import math

import pytest
import torch

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods.dpai.objective import Objective
from methods.dpai.ascents import KINDS, TOY_M, TOY_R, Skip, ascent_at, assert_direction, stack


@pytest.mark.parametrize("kind", KINDS)
def test_toy_m(kind: str) -> None:
    net, masks = stack(*TOY_M)
    graph = lower(capture(net, torch.zeros(1, 2)))
    figures = ascent_at(graph, masks, Objective(0, 0), kind).figures()
    assert (round(math.exp(figures.log_paths), 5), figures.nodes, figures.kernels) == (3, 4, 6)
    third = 1 / 3
    paths = [third, third, third, third, 2 / 3, 2 / 3], [2 / 3, third, 0, 2 / 3, third, 0], [1.0, 0]
    nodes = [0, 0, 0, 0, 2 / 3, 2 / 3], [0, 0, 0, 2 / 3, third, 0], [0, 0]
    kernels = [0, 0, 0, third, 2 / 3, 2 / 3], [0, 0, 0, 2 / 3, third, 0], [0, 0]
    mixed = [1 / 6, 1 / 6, 1 / 6, 1 / 4, 2 / 3, 2 / 3], [third, 1 / 6, 0, 2 / 3, third, 0], [0.5, 0]
    assert_direction(masks, graph, kind, Objective(0, 0), *paths)
    assert_direction(masks, graph, kind, Objective(1, 0), *nodes)
    assert_direction(masks, graph, kind, Objective(1, 1), *kernels)
    assert_direction(masks, graph, kind, Objective(0.5, 0.5), *mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_toy_r_counts_paths_beside_the_branch_once(kind: str) -> None:
    graph = lower(capture(Skip(), torch.zeros(1, 2)))
    ones = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in graph.kernels.items()}
    assert math.exp(ascent_at(graph, ones, Objective(0, 0), kind).figures().log_paths) == pytest.approx(20)
    masks = {name: torch.tensor(mask).bool() for name, mask in TOY_R.items()}
    figures = ascent_at(graph, masks, Objective(0, 0), kind).figures()
    assert math.exp(figures.log_paths) == pytest.approx(8)
    assert (figures.nodes, figures.kernels) == (6, 9)
    # Unit 0 of F2 has no way out: its incoming scores get nothing.
    assert_direction(
        masks, graph, kind, Objective(0, 0),
        [0.375, 0.375, 0.125, 0.125], [0, 0, 0.5, 0.5], [0.5, 0.25, 0.5, 0.25], [0.5, 0.5],
    )  # fmt: skip
