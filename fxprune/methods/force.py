"""FORCE: foresight connection sensitivity in many rounds, in which pruned weights may return."""

from __future__ import annotations

import torch

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.gradients import Mode, count_of, gradients_of
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential


def force(*, rounds: int = 60, batches: int = 1, mode: Mode = "train", regrow: bool = True) -> Method:
    """Foresight connection sensitivity (de Jorge et al. 2021, arXiv 2006.09081).

    Score: ``|w * mean_b dL/d(w m)|`` for all weights, w being the dense weight and the gradient that of the
    pruned network, also where it is pruned: such weights may return. Needs data with labels, read anew in
    every round. One round is SNIP. ``schedule="linear"`` is the paper's other schedule.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        batches: number of batches that are averaged in every round
        mode: run the model in train mode or in eval mode
        regrow: let pruned weights return (without, it is Iter-SNIP)

    Where fewer weights than are to be kept have a positive score (the network is cut), those kept before go
    before the others. Deviation from the authors' code: its loss is the negative logit of the true class, and
    a cut network comes back dense.

    Cost: ``rounds * batches`` forward and backward passes.
    When: as `iter-snip`, where weights that were pruned early should be able to return.
    """
    count_of("force", "batches", batches)

    def sensitivity(problem: Problem, masks: Masks) -> Scores:
        gradients = gradients_of(problem, masks, batches=batches, mode=mode, method="force")
        scores = {name: removal(g, problem.weights[name]).abs_() for name, g in gradients.items()}
        for name, score in scores.items():
            score.masked_fill_((score == 0) & masks[name], torch.finfo(score.dtype).tiny)
        return scores

    return Method(
        name="force",
        find=from_scores(sensitivity, schedule=Exponential(rounds), regrow=regrow, name="force"),
        needs=frozenset({"data"}),
        labels=True,
        summary="SNIP's score at the pruned network, in many rounds; pruned weights may return",
        paper="de Jorge et al. 2021, arXiv 2006.09081",
        shards="rows",
    )
