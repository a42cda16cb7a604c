"""Directions by kernel against those of single weights."""

import math

import pytest
import torch
from nets import NETS, WITHOUT_CIRCUIT, lowered_net
from thinning import one_in

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods.dpai import adam_topk, layer_topk
from fxprune.methods.dpai.objective import LARGEST, SMALLEST, Objective
from fxprune.paths.circuit import compile as circuits
from methods.dpai.ascents import KINDS, OBJECTIVES, Uneven, ascent_at, directions, random_masks


@pytest.mark.parametrize(
    ("name", "objective"),
    one_in(3, [name for name in NETS if name not in WITHOUT_CIRCUIT], OBJECTIVES),
)
def test_directions_are_those_of_single_weights(name: str, objective: Objective) -> None:
    graph = lowered_net(name)
    masks = random_masks(graph, 0.5)
    by_kernel, by_weight = (directions(ascent_at(graph, masks, objective, kind)) for kind in KINDS)
    for label, own in graph.kernels.items():
        units = by_kernel[label].unsqueeze(1)  # a kernel's weights share its direction
        found = units.expand(len(units), own.shape.numel() // len(units)).flatten()
        assert torch.allclose(found, by_weight[label], rtol=1e-4, atol=1e-9), label


@pytest.mark.slow
def test_nodes_of_a_branch_with_far_fewer_paths_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tells the slopes of the last branch from zero; large networks are counted in float32."""
    monkeypatch.setattr(circuits, "WIDE", 0)
    graph = lower(capture(Uneven((240, 120, 1)), torch.ones(1, 16)))
    ones = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in graph.kernels.items()}
    figures = ascent_at(graph, ones, Objective(0.5, 0.5), "kernel").figures()
    assert figures.log_paths == pytest.approx(241 * math.log(16))
    assert (figures.nodes, figures.kernels) == (361 * 16, 361 * 16**2)


def test_what_is_known_to_be_moderate_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one weight per kernel are listed; that of a branch of few paths is not moderate."""
    monkeypatch.setattr(adam_topk, "GROUP_ENTRIES", 1)
    monkeypatch.setattr(layer_topk, "INDEX_RATIO", 1)
    graph = lower(capture(Uneven((16, 8, 1)), torch.ones(1, 16)))
    masks = {name: torch.rand(own.shape).argsort(1) < 15 for name, own in graph.kernels.items()}
    ascent = ascent_at(graph, masks, Objective(0.0, 0.0), "kernel")
    ascent.figures()
    known = []
    for place, direction in enumerate(directions(ascent).values()):
        assert ascent.groups[place].kept is not None
        known.append(ascent.gradients.is_in_range(place))
        is_moderate = (direction == 0) | ((direction > SMALLEST) & (direction < LARGEST))
        assert bool(is_moderate.all()) >= known[-1]
    assert known == [name != "branches.2.0.weight" for name in graph.kernels]
