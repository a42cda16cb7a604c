"""GRASP-It: the squared gradient, in many small rounds."""

from __future__ import annotations

import torch

from fxprune.scoring.complex_weights import squared
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.gradients import Mode, count_of, gradients_of
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential


def grasp_it(*, rounds: int = 60, batches: int = 1, mode: Mode = "train") -> Method:
    """Progressive pruning by gradient flow (de Jorge et al. 2021, arXiv 2006.09081, appendix).

    Score: ``(mean_b dL/d(w m))^2``: in small steps, the gradient norm loses the squares of what is pruned.
    What is pruned stays pruned. Needs data with labels, read anew in every round. One round is not GraSP.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        batches: number of batches that are averaged in every round
        mode: run the model in train mode or in eval mode

    Squares are taken in float64, where gradients below 1e-19 do not vanish.

    Cost: ``rounds * batches`` forward and backward passes.
    When: to compare with FORCE and Iter-SNIP, under the same rounds.
    """
    count_of("grasp-it", "batches", batches)

    def flow(problem: Problem, masks: Masks) -> Scores:
        gradients = gradients_of(problem, masks, batches=batches, mode=mode, method="grasp-it")
        return {
            name: squared(g.to(torch.promote_types(g.dtype, torch.float64))) for name, g in gradients.items()
        }

    return Method(
        name="grasp-it",
        find=from_scores(flow, schedule=Exponential(rounds), name="grasp-it"),
        needs=frozenset({"data"}),
        labels=True,
        summary="keeps the largest squared gradients, in many rounds",
        paper="de Jorge et al. 2021, arXiv 2006.09081",
    )
