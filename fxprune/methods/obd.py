"""OBD: the change of the loss, to second order, with the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fxprune.scoring.complex_weights import removal
from fxprune.scoring.contract import Method, Problem, Scores, by_family, from_scores
from fxprune.scoring.data import Batch, samples_of
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average as average_over
from fxprune.scoring.gradients import Mode, count_of, masked, mean_gradients, scoring
from fxprune.sparsity.masks import Masks


def obd(*, batches: int = 1, samples: int = 64, mode: Mode = "eval") -> Method:
    """Optimal brain damage (LeCun, Denker, Solla 1989) with the empirical Fisher information.

    Score: ``w^2 * F / 2`` with ``F = mean_i (dL_i/dw)^2`` over single samples i, the diagonal of the
    empirical Fisher information, which stands for the Hessian's near a minimum (Theis et al. 2018, arXiv
    1801.05787, eq. 6). Needs data with labels, and a trained network.

    Options:
        batches: number of batches that samples are taken from
        samples: at most so many samples, each with a gradient of its own
        mode: run the model in train mode or in eval mode; a single sample has no batch statistics

    Cost: a forward and a backward pass for each of ``samples`` samples.
    When: after training to a minimum of the loss, with labelled data.
    """
    count_of("obd", "batches", batches)
    count_of("obd", "samples", samples)

    def score(problem: Problem, masks: Masks) -> Scores:
        single = list(_first(read_batches(problem, batches, "obd"), samples))
        weights = masked(problem, masks)
        alone = replace(problem, group=None)  # squares are averaged over processes, not gradients
        scores: Scores = {}
        with scoring(problem, mode):
            for sample in single:
                for name, gradient in mean_gradients(alone, weights, [sample], "obd").items():
                    square = removal(gradient, problem.weights[name]).square_().div_(2 * len(single))
                    scores[name] = scores[name].add_(square) if name in scores else square
        average_over(scores.values(), problem.group)
        return scores

    return Method(
        name="obd",
        find=by_family(from_scores(score, name="obd")),
        needs=frozenset({"data"}),
        labels=True,
        summary="keeps the weights whose removal changes the loss most, to second order",
        paper="LeCun et al. 1989; Theis et al. 2018, arXiv 1801.05787",
    )


def _first(some: list[Batch], number: int) -> Iterator[Batch]:
    left = number
    for batch in some:
        for sample in samples_of(batch)[:left]:
            yield sample
            left -= 1
