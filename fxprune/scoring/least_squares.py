"""Fit kept weights to outputs that are given, by least squares, all outputs of a layer at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_kept"]


def fit_kept(
    moments: Tensor, target: Tensor, keep: Tensor, start: Tensor, *, iterations: int, tolerance: float
) -> Tensor:
    """Minimise ``w^T moments w / 2 - w^T target`` over kept weights, for every output.

    Every output keeps weights of its own, so that it has a system of its own; all of them advance together by
    conjugate gradients, one product of matrices at a step, preconditioned by the diagonal.

    Args:
        moments: (parts, inputs, inputs), positive semi-definite.
        target: (parts, inputs, outputs), the products of inputs and wanted outputs.
        keep: bool, of the target's shape.
        start: weights to begin with.
        iterations: steps at most.
        tolerance: an output is done when its preconditioned residual has shrunk by this factor.

    Returns:
        The weights, zero where not kept.

    >>> moments = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    >>> target, keep = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[True], [False]]])
    >>> fit_kept(moments, target, keep, torch.zeros(1, 2, 1), iterations=5, tolerance=1e-9).flatten().tolist()
    [1.5, 0.0]
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0)
    weights = start * keep
    residual = (target - moments @ weights) * keep
    direction = residual / scale
    error = (residual * direction).sum(-2, keepdim=True)
    enough = error * tolerance**2
    for _ in range(iterations):
        if bool((error <= enough).all()):
            break
        moved = (moments @ direction) * keep
        curve = (direction * moved).sum(-2, keepdim=True)
        step = torch.where((curve > 0) & (error > enough), error / curve, 0.0)
        weights += step * direction
        residual -= step * moved
        ahead = residual / scale
        new = (residual * ahead).sum(-2, keepdim=True)
        direction = ahead + torch.where(error > 0, new / error, 0.0) * direction
        error = new
    return weights
