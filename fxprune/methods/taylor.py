"""Taylor: the change of the loss, to first order, that removing a weight makes in every batch."""

from __future__ import annotations

from dataclasses import replace

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, by_family, from_scores
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average as average_over
from fxprune.scoring.gradients import Mode, count_of, masked, mean_gradients, scoring
from fxprune.sparsity.masks import Masks


def taylor(*, batches: int = 1, mode: Mode = "eval") -> Method:
    """First-order Taylor expansion (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771).

    Score: ``mean_b (w * dL_b/dw)^2``, the squared change of the loss of batch b when the weight is removed,
    to first order (eq. 8). It is averaged after squaring, so that changes of either sign add up. Needs data
    with labels, and a trained network: at initialisation gradients are noise.

    Options:
        batches: number of batches that are averaged
        mode: run the model in train mode or in eval mode, as a trained network is used

    Cost: a forward and a backward pass per batch.
    When: after training, with labelled data, for channels and for weights.
    """
    count_of("taylor", "batches", batches)

    def score(problem: Problem, masks: Masks) -> Scores:
        some = read_batches(problem, batches, "taylor")
        weights = masked(problem, masks)
        alone = replace(problem, group=None)  # squares are averaged over processes, not gradients
        scores: Scores = {}
        with scoring(problem, mode):
            for batch in some:
                for name, gradient in mean_gradients(alone, weights, [batch], "taylor").items():
                    change = removal(gradient, problem.weights[name]).square_().div_(len(some))
                    scores[name] = scores[name].add_(change) if name in scores else change
        average_over(scores.values(), problem.group)
        return scores

    return Method(
        name="taylor",
        find=by_family(from_scores(score, name="taylor")),
        needs=frozenset({"data"}),
        labels=True,
        summary="keeps the weights whose removal changes the loss most, batch by batch",
        paper="Molchanov et al. 2019, arXiv 1906.10771",
    )
