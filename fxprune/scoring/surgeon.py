"""Optimal brain surgery on matrices: remove weights one input at a time, and let later inputs make up for it.

The inputs' second moments and a rule that chooses weights come in; masks and new weights go out. Matrices are
stacked as (parts, inputs, outputs), so that all weights of one input lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Chooser",
    "check_damp",
    "damped",
    "damping",
    "dense_scores",
    "inverse_root",
    "scores_of",
    "surgery",
    "upper_factor",
]


class Moments(Protocol):
    """A matrix in a parameter: its places, and the moments of its inputs."""

    @property
    def positions(self) -> Tensor:
        """(parts, inputs, outputs)."""

    @property
    def moments(self) -> Tensor:
        """(parts, inputs, inputs)."""

    @property
    def rows(self) -> int:
        """Vectors of inputs that the moments are sums over."""


Chooser = Callable[[int, int, Tensor], Tensor]
"""``chooser(first, last, scores)``: the weights to keep (bool) of inputs ``first`` to ``last``, which have
``scores`` of shape (parts, last - first, outputs)."""

LEAF = 8
"""Inputs that are handled one by one before the others hear of it."""

LAZY = 128
"""Inputs, at least, that hear together of the inputs before them."""

ATTEMPTS = 6
"""Times that the damping may be multiplied by ten until the Hessian has a root."""


def check_damp(method: str, damp: float | None) -> None:
    """Raise ``ValueError`` for a damping that is no share, in the name of ``method``."""
    if damp is not None and not damp >= 0:
        raise ValueError(
            f"method {method!r}: damp={damp!r}, expected a share of the mean diagonal, at least 0"
        )


def damping(asked: float | None, rows: int) -> float:
    """Return the damping that was asked for, or else one that falls with the number of vectors of inputs.

    Moments of few inputs say little of others: fitted to them alone, weights are worse on new data than
    weights that were not fitted at all. ``10 / sqrt(rows)``, and not less than 0.01, is near the damping with
    the least error on held-out images in single layers of a classifier, for 64 to 3000 rows.

    >>> damping(None, 400), damping(None, 10**8), damping(0.1, 400)
    (0.5, 0.01, 0.1)
    """
    return max(0.01, 10 / max(rows, 1) ** 0.5) if asked is None else asked


def damped(hessian: Tensor, damp: float) -> Tensor:
    """Add ``damp`` times the mean of its diagonal to a Hessian (parts, inputs, inputs); returns a copy.

    Inputs that are always zero get a one on the diagonal: they are tied to no other.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    added = (damp * diagonal.mean(-1, keepdim=True)).expand_as(diagonal)
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(torch.where(diagonal == 0, 1.0, added))
    return result


def upper_factor(hessian: Tensor, damp: float) -> Tensor:
    """Return the upper triangular U with ``hessian + damping = U U^T``, for every part.

    It is the Cholesky root of the Hessian with its inputs in reverse order, turned back. Its inverse is the R
    of :func:`inverse_root`; block by block, too: ``R[a:b, a:b]`` is the inverse of ``U[a:b, a:b]``.

    Raises ``ValueError`` for a Hessian that is not positive definite even with a million times the damping.

    >>> hessian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    >>> upper = upper_factor(hessian, 0.0)
    >>> torch.allclose(upper @ upper.mT, hessian), float(upper[0, 1, 0])
    (True, 0.0)
    """
    for attempt in range(ATTEMPTS + 1):
        turned = damped(hessian, max(damp, 1e-8) * 10**attempt if attempt else damp).flip(-1, -2)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not bool(failed.any()):
            upper: Tensor = lower.flip(-1, -2)
            return upper
    raise ValueError(f"damp={damp!r}: the Hessian of the inputs is not positive definite; ask for more")


def inverse_root(hessian: Tensor, damp: float) -> Tensor:
    """Return the upper triangular R with ``inverse(hessian + damping) = R^T R``, for every part.

    Raises what :func:`upper_factor` does.

    >>> hessian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    >>> root = inverse_root(hessian, 0.0)
    >>> torch.allclose(root.mT @ root, hessian.inverse())
    True
    """
    return _lower_inverse(upper_factor(hessian, damp).flip(-1, -2)).flip(-1, -2)


def _lower_inverse(lower: Tensor) -> Tensor:
    """Invert lower triangular matrices by halves, which is all products of matrices."""
    size = lower.shape[-1]
    if size <= 64:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return solved
    half = size // 2
    first, last = _lower_inverse(lower[..., :half, :half]), _lower_inverse(lower[..., half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[..., :half, :half], inverse[..., half:, half:] = first, last
    torch.matmul(last @ lower[..., half:, :half], first, out=inverse[..., half:, :half]).neg_()
    return inverse


def scores_of(weights: Tensor, root: Tensor) -> Tensor:
    """Compute ``w^2 / R_jj^2``: the error if only this weight, and no input after it, is changed."""
    return (weights / root.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).square()


def dense_scores(weight: Tensor, matrices: Sequence[Moments], unseen: Tensor, damp: float | None) -> Tensor:
    """Compute ``w^2 / [H^-1]_jj``: the error if a weight goes and all others of its output make up for it.

    Weights of inputs that are always zero have none; the weights at the places ``unseen``, whose inputs are
    not known, get the mean of the others' factors.
    """
    scores = weight.square()
    flat, scales = scores.view(-1), []
    for matrix in matrices:
        inverse = inverse_root(matrix.moments, damping(damp, matrix.rows)).square().sum(-2)
        dead = matrix.moments.diagonal(dim1=-2, dim2=-1) == 0
        scale = torch.where(dead, 0.0, 1 / inverse)
        flat[matrix.positions] *= scale.unsqueeze(-1)
        scales.append(scale.mean())
    if scales and len(unseen):
        flat[unseen] *= torch.stack(scales).mean()
    return scores


def surgery(weights: Tensor, factor: Tensor, chooser: Chooser, block: int) -> Tensor:
    """Remove weights input by input, in place, and add what is lost to the inputs that follow.

    Algorithm 1 of SparseGPT (Frantar & Alistarh 2023): where input j loses a weight w, the weights of the
    inputs after it change by ``-w / R_jj * R_j``, with R the inverse of U, ``factor``. No inverse is needed
    for that, but of small parts of U on its diagonal. With e the lost weights over R_jj, and Z the dense
    weights minus the new ones, ``Z = R^T e``, so that ``e = U^T Z``. If the inputs before a part B are done,
    and none in it is, e is zero in B, and B's weights now are ``w_B + R_BB^T U_*B^T Z_*``, where * are the
    inputs before it: one product of matrices for a part, which reads Z and writes B alone.

    Args:
        weights: (parts, inputs, outputs), overwritten by the new weights, zero where pruned.
        factor: (parts, inputs, inputs), of :func:`upper_factor`.
        chooser: asked for every ``block`` inputs, when all inputs before them are done.
        block: inputs whose weights are chosen together (the paper's Bs).

    Returns:
        The masks (bool), of the shape of ``weights``.
    """
    keep, change = torch.ones_like(weights, dtype=torch.bool), torch.empty_like(weights)
    inputs, step = weights.shape[1], max(block, LAZY // block * block)
    for first in range(0, inputs, step):
        last = min(first + step, inputs)
        before, upper = factor[:, :first, first:last], factor[:, first:last, first:last]
        eye = torch.eye(last - first, dtype=upper.dtype, device=upper.device).expand_as(upper)
        root = torch.linalg.solve_triangular(upper, eye, upper=True)
        own = weights[:, first:last]
        now = own.clone()
        if first:
            now.baddbmm_(root.mT, before.mT @ change[:, :first])
        keep[:, first:last] = _remove(now, root, chooser, block, first)
        torch.sub(own, now, out=change[:, first:last])
        own.copy_(now)
    return keep


def _remove(weights: Tensor, root: Tensor, chooser: Chooser, block: int, offset: int) -> Tensor:
    """Do the same for a part of the inputs, from ``offset`` on, with R itself.

    Updates are lazy: halves of halves of the inputs are done before their errors reach the next half, as one
    product of matrices.
    """
    keep = torch.ones_like(weights, dtype=torch.bool)
    gone, errors = torch.empty_like(weights), torch.empty_like(weights)
    scaled = root / root.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

    def leaf(first: int, last: int) -> None:
        for j in range(first, last):
            error = torch.mul(weights[:, j], gone[:, j], out=errors[:, j])
            if j + 1 < last:
                weights[:, j + 1 : last].addcmul_(scaled[:, j, j + 1 : last, None], error[:, None], value=-1)

    def visit(first: int, last: int, chosen: bool) -> None:
        size = last - first
        if not chosen and size <= block:
            chosen = True
            scores = scores_of(weights[:, first:last], root[:, first:last, first:last])
            keep[:, first:last] = chooser(offset + first, offset + last, scores)
            torch.logical_not(keep[:, first:last], out=gone[:, first:last])
        if size <= min(LEAF, block):
            leaf(first, last)
            return
        half = -(-size // block) // 2 * block if size > block else size // 2
        middle = first + half
        visit(first, middle, chosen)
        behind = scaled[:, first:middle, middle:last].mT
        weights[:, middle:last].baddbmm_(behind, errors[:, first:middle], alpha=-1)
        visit(middle, last, chosen)

    visit(0, weights.shape[1], False)
    weights *= keep
    return keep
