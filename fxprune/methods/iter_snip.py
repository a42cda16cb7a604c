"""Iter-SNIP: SNIP in many small rounds, each on the network that the rounds before have left."""

from __future__ import annotations

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.gradients import Mode, count_of, gradients_of
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential


def iter_snip(*, rounds: int = 60, batches: int = 1, mode: Mode = "train") -> Method:
    """Iterative SNIP (de Jorge et al. 2021, arXiv 2006.09081; Verdenius et al. 2020, arXiv 2006.00896).

    Score: ``|w * mean_b dL/d(w m)|`` at the pruned network of the round; what is pruned stays pruned. Needs
    data with labels, read anew in every round, so that a shuffling loader gives fresh batches. One round is
    SNIP.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        batches: number of batches that are averaged in every round
        mode: run the model in train mode or in eval mode

    Deviations from the authors' code: the loss is the cross entropy (theirs is the negative logit of the true
    class; pass it as ``loss_fn``), and ties never keep more than the budget or bring weights back.

    Cost: ``rounds * batches`` forward and backward passes.
    When: at initialization, with labelled data, at high sparsities.
    """
    count_of("iter-snip", "batches", batches)

    def sensitivity(problem: Problem, masks: Masks) -> Scores:
        gradients = gradients_of(problem, masks, batches=batches, mode=mode, method="iter-snip")
        return {name: removal(g, problem.weights[name]).abs_() for name, g in gradients.items()}

    return Method(
        name="iter-snip",
        find=from_scores(sensitivity, schedule=Exponential(rounds), name="iter-snip"),
        needs=frozenset({"data"}),
        labels=True,
        summary="SNIP in many rounds; what is pruned stays pruned",
        paper="de Jorge et al. 2021, arXiv 2006.09081",
        shards="rows",
    )
