"""SNIP: keeps the connections whose removal would change the loss most."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average as average_over
from fxprune.scoring.gradients import Mode, count_of, masked, mean_gradients, scoring
from fxprune.sparsity.masks import Masks


def snip(
    *, batches: int = 1, mode: Mode = "train", average: Literal["gradient", "saliency"] = "gradient"
) -> Method:
    """Connection sensitivity (Lee, Ajanthan, Torr 2019, arXiv 1810.02340).

    Score: ``|w * mean_b dL/dw|``, which is |dL/dc| for weights c * w at c = 1. Needs data with labels; the
    loss is the mean cross entropy unless ``loss_fn`` is given. One round; under a ``schedule`` it is
    Iter-SNIP, which reads its batches anew in every round.

    Options:
        batches: number of batches that are averaged
        mode: run the model in train mode (BatchNorm uses the batch, dropout drops) or in eval mode
        average: average gradients over batches, or the saliencies |w * dL/dw| of single batches

    In train mode, the default, the loss is the one that training starts from. Code that scores in eval mode
    sees BatchNorm's initial statistics instead and keeps other weights.

    Cost: a forward and a backward pass per batch.
    When: at initialization, with labelled data, in one shot; far above 98 % layers collapse, then
        `iter-snip`.
    """
    count_of("snip", "batches", batches)

    def sensitivity(problem: Problem, masks: Masks) -> Scores:
        some = read_batches(problem, batches, "snip")
        weights = masked(problem, masks)
        groups = [some] if average == "gradient" else [[batch] for batch in some]
        scores: Scores = {}
        # Saliencies of single batches are averaged as such, not their gradients, over processes too.
        if average == "saliency" and problem.shards is not None:
            raise ValueError("method 'snip': average='saliency' cannot be had of sharded parameters")
        alone = problem if average == "gradient" else replace(problem, group=None)
        with scoring(problem, mode):
            for group in groups:
                for name, gradient in mean_gradients(alone, weights, group, "snip").items():
                    saliency = removal(gradient, problem.weights[name]).abs_()
                    scores[name] = scores[name].add_(saliency) if name in scores else saliency
        if alone is not problem:
            average_over(scores.values(), problem.group)
        return scores

    return Method(
        name="snip",
        find=from_scores(sensitivity, name="snip"),
        needs=frozenset({"data"}),
        labels=True,
        summary="keeps the weights whose removal changes the loss most",
        paper="Lee et al. 2019, arXiv 1810.02340",
        shards="rows" if average == "gradient" else "no",
    )
