"""ALPS: the best weights under a budget by alternating directions, layer by layer, on calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.scoring.contract import Found, Method, Problem
from fxprune.scoring.gradients import count_of
from fxprune.scoring.layer_plan import Plan, Split, choose_in_layer, solve_in_rounds
from fxprune.scoring.least_squares import fit_kept
from fxprune.scoring.sequential import Layer, Matrix
from fxprune.scoring.surgeon import check_damp, damped, damping, dense_scores

NAME = "alps"
PENALTY = 0.1
"""The first penalty, on inputs of unit norm."""

PERIOD = 3
"""Steps between two looks at how much the masks still change."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""How the penalty grows where more than this share of the kept weights changed."""


def alps(
    *,
    batches: int = 1,
    damp: float | None = None,
    steps: int = 300,
    propagate: bool = True,
    split: Split = "equal",
    checkpoint_dir: str | None = None,
) -> Method:
    """One-shot pruning by ADMM (Meng, Behdin, Wang & Mazumder 2024, arXiv 2406.07831).

    ``|X W_d - X W|^2`` is minimised over weights W of which a given number is not zero: a ridge regression
    and a choice of the largest weights alternate, with a penalty on their difference that grows until the
    masks stand still; then the kept weights are fitted by conjugate gradients. Needs data; labels are not
    looked at. Masks mostly have less error than those of `sparsegpt`, at more time: one eigendecomposition
    of a layer's Hessian, and two products of matrices a step. Deviation from the paper: it begins at the
    mask of optimal brain surgery in the dense layer, instead of the dense weights.

    Options:
        batches: number of batches that are run
        damp: added to the diagonal of the inputs' moments, as a share of its mean; None, for 10 / sqrt(rows)
            of a layer with so many vectors of inputs in the data, and at least 0.01
        steps: of the alternation, at most
        propagate: whether a layer sees what the pruned layers before it give, instead of the dense ones
        split: under ``budget="global"`` every layer loses an "equal" share, or the one at which a further
            weight costs all the same "error", relative to the outputs of its layer
        checkpoint_dir: a folder that keeps solved layers; after a kill the same call with the same data goes
            on at the next

    Any granularity; channels are chosen by the scores of the dense layers, and the weights that stay fitted.

    Cost: a forward pass per batch; an eigendecomposition per layer, two products of matrices a step.
    When: as `sparsegpt`, where masks of less error are worth more time.
    """
    count_of(NAME, "batches", batches)
    count_of(NAME, "steps", steps)
    check_damp(NAME, damp)

    def find(problem: Problem) -> Found:
        return solve_in_rounds(
            problem,
            lambda plan, layer: solve_layer(layer, plan, damp, steps),
            lambda layer: dense_scores(layer.weight, layer.matrices, layer.unseen, damp),
            batches=batches,
            propagate=propagate,
            method=NAME,
            split=split,
            checkpoint_dir=checkpoint_dir,
            options={"damp": damp, "steps": steps},
        )

    return Method(
        name="alps",
        find=find,
        needs=frozenset({"data"}),
        summary="finds masks and weights of each layer together, by ADMM; for pretrained networks",
        paper="Meng, Behdin, Wang & Mazumder 2024, arXiv 2406.07831",
        scored=False,
        updates=True,
    )


@dataclass
class _Split:
    """A matrix with inputs of unit norm: its eigenvectors and eigenvalues, and the state of the alternation.

    All of shape (parts, inputs, outputs) but ``vectors`` (parts, inputs, inputs), and ``values`` and
    ``scale`` (parts, inputs, 1). ``target``: products of inputs and wanted outputs; ``kept``: the weights
    under the mask, ``dual``: what the penalty has summed up.
    """

    matrix: Matrix
    vectors: Tensor
    values: Tensor
    scale: Tensor
    target: Tensor
    kept: Tensor
    dual: Tensor
    dead: Tensor

    @classmethod
    def of(cls, matrix: Matrix, weight: Tensor, damp: float | None) -> _Split:
        """Scale the inputs of a matrix to unit norm, and take its moments apart."""
        hessian = damped(matrix.moments, damping(damp, matrix.rows))
        scale = hessian.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
        hessian = hessian / scale / scale.mT
        values, vectors = torch.linalg.eigh(hessian)
        start = weight.view(-1)[matrix.positions] * scale
        dead = matrix.moments.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) == 0
        zero = torch.zeros_like(start)
        return cls(
            matrix, vectors, values.clamp(min=0).unsqueeze(-1), scale, hessian @ start, start, zero, dead
        )

    def regressed(self, penalty: float) -> Tensor:
        """The weights that fit the outputs and lie near the kept ones, and what the penalty asks for."""
        wanted = self.target - self.dual + penalty * self.kept
        fitted: Tensor = self.vectors @ (self.vectors.mT @ wanted / (self.values + penalty))
        return fitted


def solve_layer(layer: Layer, plan: Plan, damp: float | None, steps: int) -> tuple[Tensor, Tensor]:
    """Return the mask and the new weights of one layer."""
    if not plan.masks and plan.layers[layer.name] == int(layer.mask.sum()):
        return layer.mask, layer.weight
    mask = choose_in_layer(plan, layer, dense_scores(layer.weight, layer.matrices, layer.unseen, damp))
    if not plan.masks:
        mask = _alternated(layer, plan, damp, steps, mask)
    weight = layer.weight * mask
    flat, keep = weight.view(-1), mask.reshape(-1)
    for matrix in layer.matrices:
        hessian, start = damped(matrix.moments, damping(damp, matrix.rows)), flat[matrix.positions]
        target = hessian @ layer.weight.reshape(-1)[matrix.positions]
        flat[matrix.positions] = fit_kept(
            hessian, target, keep[matrix.positions], start, iterations=100, tolerance=1e-6
        )
    return mask, weight


def _alternated(layer: Layer, plan: Plan, damp: float | None, steps: int, mask: Tensor) -> Tensor:
    """The mask at which the alternation stands still; ``mask`` is where it begins."""
    splits = [_Split.of(matrix, layer.weight, damp) for matrix in layer.matrices]
    scores, penalty, before, number = _unseen(layer, splits), PENALTY, mask, max(int(mask.sum()), 1)
    flat = scores.view(-1)
    for split in splits:
        split.kept = split.kept * mask.reshape(-1)[split.matrix.positions]
    for step in range(1, steps + 1):
        moved = []
        for split in splits:
            fitted = split.regressed(penalty)
            moved.append((fitted, fitted + split.dual / penalty))
            flat[split.matrix.positions] = moved[-1][1].square().masked_fill(split.dead, 0.0)
        mask = choose_in_layer(plan, layer, scores)
        for split, (fitted, free) in zip(splits, moved, strict=True):
            split.kept = free * mask.reshape(-1)[split.matrix.positions]
            split.dual = split.dual + penalty * (fitted - split.kept)
        if step % PERIOD == 0:
            changed = int((mask != before).sum()) / number
            if not changed:
                break
            penalty *= next(factor for share, factor in GROWTH if changed >= share)
            before = mask
    return mask


def _unseen(layer: Layer, splits: list[_Split]) -> Tensor:
    """Scores of the weights whose inputs are not known: as if these were like the others on average."""
    scores = layer.weight.square()
    if splits and len(layer.unseen):
        scores.view(-1)[layer.unseen] *= torch.stack([split.scale.square().mean() for split in splits]).mean()
    return scores
