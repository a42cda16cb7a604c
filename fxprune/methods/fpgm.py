"""FPGM: filters near the geometric median of their layer can be replaced by the others."""

from __future__ import annotations

import torch

from fxprune.channels.orientation import output_first
from fxprune.scoring.contract import Method, Problem, Scores, by_rows, from_scores
from fxprune.sparsity.masks import Masks


def fpgm() -> Method:
    """Filter pruning via geometric median (He, Liu, Wang, Hu, Yang 2019, arXiv 1811.00250).

    Score of an output channel: the sum of the Euclidean distances of its weights to those of all output
    channels of the layer (eq. 6), shared by all its weights. Meant for ``granularity="channel"``, where the
    score of a group is the mean over the output channels in it. Needs nothing.

    The authors compare within layers, as ``scope="layer"`` does. Distances grow with the size of a filter, so
    they are divided by their mean over the layer, that layers can compete; a single filter has the score 1.

    Cost: the distances of all pairs of output channels in every layer.
    When: after training, for channels, without data.
    """
    return Method(
        name="fpgm",
        find=by_rows(from_scores(_distances, name="fpgm")),
        summary="keeps the output channels that differ most from the others of their layer",
        paper="He et al. 2019, arXiv 1811.00250",
        reads_only=True,
    )


def _distances(problem: Problem, masks: Masks) -> Scores:
    scores = {}
    for name, weight in problem.weights.items():
        kernels = problem.graph.kernels.get(name)
        own = output_first(weight * masks[name], kernels)
        filters = own.flatten(1)
        filters = (torch.view_as_real(filters).flatten(1) if own.is_complex() else filters).double()
        distances = torch.cdist(filters, filters).sum(1)
        relative = distances / distances.mean() if bool(distances.any()) else torch.ones_like(distances)
        score = relative.view(-1, *[1] * (own.dim() - 1)).expand(own.shape)
        scores[name] = output_first(score.contiguous(), kernels)
    return scores
