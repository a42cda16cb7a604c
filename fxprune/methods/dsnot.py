"""DSnoT: refine masks without training, weight for weight, on calibration data."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fxprune.scoring.contract import Method, Problem
from fxprune.scoring.gradients import count_of
from fxprune.scoring.layer_plan import Plan, Split, choose_in_layer, solve_in_rounds
from fxprune.scoring.sequential import Layer, Matrix
from fxprune.scoring.surgeon import dense_scores
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks

NAME = "dsnot"


def dsnot(
    *,
    batches: int = 1,
    start: Literal["wanda", "magnitude", "surgeon"] = "wanda",
    cycles: int = 50,
    enough: float = 0.1,
    propagate: bool = True,
    split: Split = "equal",
    checkpoint_dir: str | None = None,
) -> Method:
    """Dynamic sparsity without training (Zhang et al. 2024, arXiv 2310.08915).

    Layer by layer, a first mask is refined within every output: of the pruned weights the one comes back that
    takes most from the mean error of the output, per variance of its input, ``w_j * E[x_j] / Var[x_j]``, and
    of the weights that stay, and move the error the same way as they go, the one with the least
    ``|w_j| * ||x_j||_2`` goes; until the error is small, or does not fall any more. Needs data; labels are
    not looked at. No weight changes, and every output keeps as many as in the first mask. Patterns, blocks
    and channels stay as they are in the first mask.

    Options:
        batches: number of batches that are run
        start: the first mask: by "wanda" within every output, by "magnitude" or by the errors of optimal
            brain "surgeon" within the layer
        cycles: pairs of weights that an output exchanges, at most
        enough: the mean error, as a share of the outputs' root mean square, at which an output is done (the
            paper's threshold, there not relative)
        propagate: whether a layer sees what the pruned layers before it give, instead of the dense ones
        split: under ``budget="global"``, as of `alps`
        checkpoint_dir: a folder that keeps solved layers; after a kill the same call goes on at the next

    Cost: a forward pass per batch, and at most ``cycles`` exchanges in every output.
    When: as `wanda`, where that loses too much and weights must stay as they are.
    """
    count_of(NAME, "batches", batches)
    count_of(NAME, "cycles", cycles)
    if not enough >= 0:
        raise ValueError(f"method {NAME!r}: enough={enough!r}, expected a share, at least 0")

    def find(problem: Problem) -> Masks:
        found = solve_in_rounds(
            problem,
            lambda plan, layer: _solved(layer, plan, start, cycles, enough),
            lambda layer: dense_scores(layer.weight, layer.matrices, layer.unseen, None),
            batches=batches,
            propagate=propagate,
            method=NAME,
            split=split,
            checkpoint_dir=checkpoint_dir,
            options={"start": start, "cycles": cycles, "enough": enough},
        )
        return found[0] if isinstance(found, tuple) else found

    return Method(
        name="dsnot",
        find=find,
        needs=frozenset({"data"}),
        summary="exchanges weights of a first mask until mean errors are small; for pretrained networks",
        paper="Zhang et al. 2024, arXiv 2310.08915",
        scored=False,
    )


def _solved(layer: Layer, plan: Plan, start: str, cycles: int, enough: float) -> tuple[Tensor, Tensor]:
    """Return the mask of one layer, and its weights under it."""
    if not plan.masks and plan.layers[layer.name] == int(layer.mask.sum()):
        return layer.mask, layer.weight
    mask = choose_in_layer(plan, layer, _first_scores(layer, start))
    if plan.granularity != WEIGHT:
        return mask, layer.weight * mask
    flat, within = mask.view(-1), layer.mask.reshape(-1)
    for matrix in layer.matrices:
        places = matrix.positions
        values = layer.weight.reshape(-1)[places]
        flat[places] = refined(matrix, values, flat[places], within[places], cycles, enough)
    return mask, layer.weight * mask


def _first_scores(layer: Layer, start: str) -> Tensor:
    if start == "magnitude":
        return layer.weight.abs()
    if start == "surgeon":
        return dense_scores(layer.weight, layer.matrices, layer.unseen, None)
    # Ranks within every output: a threshold keeps the same share of each.
    scores = torch.zeros_like(layer.weight)
    flat = scores.view(-1)
    for matrix in layer.matrices:
        diagonal = matrix.moments.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        size = layer.weight.reshape(-1)[matrix.positions].square() * diagonal
        order = size.argsort(dim=1, stable=True).argsort(dim=1)
        flat[matrix.positions] = (order + 0.5).to(scores.dtype) / size.shape[1]
    if len(layer.unseen):
        sizes = layer.weight.reshape(-1)[layer.unseen].abs()
        ranks = sizes.argsort(stable=True).argsort()
        flat[layer.unseen] = (ranks + 0.5).to(scores.dtype) / len(sizes)
    return scores


def refined(
    matrix: Matrix, weight: Tensor, keep: Tensor, within: Tensor, cycles: int, enough: float
) -> Tensor:
    """Exchange weights of every output, all outputs at once.

    ``weight``, ``keep`` and ``within``, the weights that may be kept: (parts, inputs, outputs). Returns the
    masks.
    """
    assert matrix.sums is not None
    mean = matrix.sums[0].unsqueeze(-1) / matrix.total
    square = matrix.moments.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) / matrix.total
    variance = (square - mean.square()).clamp(min=1e-12)
    share, size = weight * mean, weight.square() * square
    energy = (weight * (matrix.moments @ weight)).sum(1, keepdim=True).clamp(min=0) / matrix.total
    limit = enough * energy.sqrt()
    keep = keep.clone()
    error = (share * ~keep).sum(1, keepdim=True)  # what pruned weights gave to the outputs, on average
    for _ in range(cycles):
        sign = error.sign()
        towards = sign * share
        gain = (towards / variance).masked_fill(keep | ~within, -torch.inf)
        loss = size.masked_fill(~keep | (towards >= 0), torch.inf)
        back, gone = gain.argmax(1, keepdim=True), loss.argmin(1, keepdim=True)
        new = error - share.gather(1, back) + share.gather(1, gone)
        moves = (error.abs() > limit) & (gain.gather(1, back) > 0) & loss.gather(1, gone).isfinite()
        moves &= new.abs() < error.abs()
        if not bool(moves.any()):
            break
        keep.scatter_(1, back, keep.gather(1, back) | moves)
        keep.scatter_(1, gone, keep.gather(1, gone) & ~moves)
        error = torch.where(moves, new, error)
    return keep
