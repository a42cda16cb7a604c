"""Wanda: magnitudes times the norms of what the weights read, compared within each output."""

from __future__ import annotations

from typing import Literal

import torch

from fxprune.channels.orientation import output_first
from fxprune.scoring.complex_weights import refuse_complex
from fxprune.scoring.contract import Method, Problem, Scores, from_scores
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.gradients import count_of, masked, scoring
from fxprune.scoring.inputs import input_norms
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks


def wanda(*, batches: int = 1, compare: Literal["output", "layer", "model"] = "output") -> Method:
    """Pruning by weights and activations (Sun, Liu, Bair, Kolter 2024, arXiv 2306.11695).

    Score: ``|w_ij| * ||x_j||_2``, the norm of the weight's input over all samples and positions (eq. 1).
    Needs data; labels are not looked at. For pretrained networks: one pass, no update of weights.

    Options:
        batches: number of batches that norms are measured over
        compare: weights compete with those of the same "output" (the paper's), of the same "layer" (better
            for image classifiers, section 5), or all over the "model"

    Within outputs or layers every one of them loses the same share, or what ``budget`` gives its layer.
    Channels compete by their plain scores. A layer that a network applies several times reads all its inputs.

    Cost: a forward pass per batch.
    When: for large pretrained networks that are not trained afterwards, without labels.
    """
    count_of("wanda", "batches", batches)

    def score(problem: Problem, masks: Masks) -> Scores:
        refuse_complex(problem, "wanda")
        some = read_batches(problem, batches, "wanda")
        weights = masked(problem, masks)
        with scoring(problem, "eval"):
            norms = input_norms(problem, weights, some, "wanda")
        scores = {name: problem.weights[name].abs() * masks[name] * norm for name, norm in norms.items()}
        if compare == "model" or isinstance(problem.granularity, ChannelGroups):
            return scores
        return {name: _ranks(problem, name, score, compare) for name, score in scores.items()}

    return Method(
        name="wanda",
        find=from_scores(score, name="wanda"),
        needs=frozenset({"data"}),
        summary="keeps the weights with the largest product of magnitude and input, for pretrained networks",
        paper="Sun et al. 2024, arXiv 2306.11695",
    )


def _ranks(problem: Problem, name: str, score: torch.Tensor, compare: str) -> torch.Tensor:
    """The rank of every weight among those it competes with, in (0, 1): a threshold keeps equal shares."""
    kernels = problem.graph.kernels.get(name)
    own = output_first(score, kernels)
    lines = own.flatten(1) if compare == "output" else own.reshape(1, -1)
    order = lines.argsort(dim=1, stable=True, descending=True)
    places = torch.arange(lines.shape[1], device=lines.device, dtype=torch.float64)
    ranks = torch.empty_like(lines, dtype=torch.float64).scatter_(
        1, order, (1 - (places + 0.5) / lines.shape[1]).expand_as(lines)
    )
    return output_first(ranks.view(own.shape), kernels)
