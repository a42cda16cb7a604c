"""The taps of a layer against all choices of taps."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.methods.balance.tap_refinement import TapRefinement
from fxprune.methods.balance.target import Target
from fxprune.methods.dpai.objective import Figures
from fxprune.paths.count import flow
from methods.problems import asked


@pytest.mark.slow
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
