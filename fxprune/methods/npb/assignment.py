"""Solve the node-path balancing programme of one layer exactly, without a solver.

Let M (inputs x outputs) be the numbers of weights, r and c its row and column sums. The programme (Pham et
al. 2023) maximises, over integers 0 <= M_ij <= K with a sum of at most n,

    alpha A + (1 - alpha) B + beta C,    A = (sum_i min(r_i, m) + sum_j min(c_j, m) + const) / (I + J),
    B = sum_i P_i r_i / P_max,           C = (number of kernels with M_ij > 0) / n + const,

A counting nodes with at least m weights (in part below m), B the incoming paths, C the kernels in use.

*Theorem.* Fix r, with 0 <= r_i <= K J, and distribute the weights cyclically: row after row, each weight to
the next column. Then all of A, B and C are as large as this r allows. *Proof.* B depends on r alone. Row i
uses min(r_i, J) columns, and no row can use more: C is at its upper bound. Column sums differ by one at most,
and sum_j min(c_j, m), concave and symmetric, is largest among all c of that sum where c is level: A is at its
upper bound. A row puts at most ceil(r_i / J) <= K weights on one kernel, so M is feasible. []

It remains to choose r: a sum of concave functions of the single r_i,

    alpha / (I + J) min(r_i, m) + (1 - alpha) P_i / P_max r_i + beta / n min(r_i, J),

with a bound on the sum, plus a column term that depends on the sum alone. Marginal gains of one row never
rise, so that taking the n largest gains of all is optimal (greedy on a separable concave resource), and no
gain is negative. In a grouped layer each group is such a problem; its optimum is concave in its share of n
(its gains in order, plus the column gain alpha / (I + J) for its first m J weights), so the same greedy
choice over all groups is optimal again. Each row has three levels of gain at most: the cost is a sort.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["solve"]


def solve(
    paths: Tensor,
    outputs: int,
    budget: int,
    *,
    alpha: float,
    beta: float,
    cap: int,
    least: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An optimal M: how many weights each kernel of a layer gets.

    Args:
        paths: P, shape (groups, inputs of a group), non-negative. Inputs without any path can feed nothing:
            they get weights only when the others are full.
        outputs: J, output channels of one group.
        budget: n; less is used only if K I J is less.
        alpha, beta, cap, least: alpha, beta, K and m above.
        generator: draws one of the optima (rows and columns in random order); the first one without it.

    Returns:
        int64, shape (groups, inputs, outputs).

    Example, two inputs with 3 and 1 paths, n = 2, K = 1: below alpha = 4/7 both weights go to the first.

        >>> solve(torch.tensor([[3.0, 1.0]]), 2, 2, alpha=0.57, beta=0.0, cap=1)
        tensor([[[1, 1],
                 [0, 0]]])
        >>> solve(torch.tensor([[3.0, 1.0]]), 2, 2, alpha=0.58, beta=0.0, cap=1)
        tensor([[[1, 0],
                 [0, 1]]])
    """
    paths = paths.double()
    groups, inputs = paths.shape
    order = _shuffled(groups, inputs, generator)
    rows = _row_sums(paths.gather(1, order), outputs, budget, alpha, beta, cap, least)
    in_order = _distribute_cyclically(rows, outputs)
    counts = torch.empty_like(in_order).scatter_(1, order.unsqueeze(2).expand_as(in_order), in_order)
    columns = _shuffled(groups, outputs, generator).unsqueeze(1).expand_as(counts)
    return counts.gather(2, columns)


def most_paths(paths: Tensor, outputs: int, budget: int, cap: int) -> float:
    """P_max: the most paths that ``budget`` weights can take in, at most ``cap`` on a kernel."""
    best = paths.flatten().sort(descending=True).values
    room = torch.full_like(best, outputs * cap)
    before = room.cumsum(0) - room
    return float((best * torch.minimum(room, (budget - before).clamp(min=0))).sum())


def _row_sums(
    paths: Tensor, outputs: int, budget: int, alpha: float, beta: float, cap: int, least: int
) -> Tensor:
    """r, of the shape of ``paths``: take the ``budget`` largest marginal gains."""
    groups, inputs = paths.shape
    node = alpha / (groups * (inputs + outputs))
    kernel = beta / max(budget, 1)
    top = most_paths(paths, outputs, budget, cap)
    path = (1 - alpha) * paths / top if top > 0 else torch.zeros_like(paths)
    is_dead = (paths <= 0) & (top > 0)
    # The gain of a row changes at these numbers of weights.
    levels = sorted({0, min(least, cap * outputs), outputs, cap * outputs})
    gains, sizes = [], []
    for start, end in pairwise(levels):
        gain = path + node * (start < least) + kernel * (start < outputs)
        gains.append(gain.masked_fill(is_dead, -1.0))
        sizes.append(torch.full_like(gain, end - start))
    # A group's gains in order; each of its first least * outputs weights serves a column short of ``least``.
    gain, by_gain = torch.stack(gains, 2).flatten(1).sort(dim=1, descending=True, stable=True)
    size = torch.stack(sizes, 2).flatten(1).gather(1, by_gain)
    early = (least * outputs - (size.cumsum(1) - size)).clamp(min=0).minimum(size)
    gain = torch.stack([gain + node * (gain >= 0), gain], 2)
    size = torch.stack([early, size - early], 2)
    best = gain.flatten().sort(descending=True, stable=True).indices
    wanted = size.flatten()[best]
    taken = torch.zeros_like(wanted).scatter_(
        0, best, (budget - (wanted.cumsum(0) - wanted)).clamp(min=0).minimum(wanted)
    )
    per_part = taken.view(size.shape).sum(2)
    per_part = torch.zeros_like(per_part).scatter_(1, by_gain, per_part)
    return per_part.view(groups, inputs, -1).sum(2).round().long()


def _distribute_cyclically(rows: Tensor, outputs: int) -> Tensor:
    """Give each weight to the next column, row after row: int64, (groups, inputs, outputs)."""
    start = (rows.cumsum(1) - rows) % outputs
    column = torch.arange(outputs, device=rows.device)
    after_start = (column - start.unsqueeze(2)) % outputs
    return (rows // outputs).unsqueeze(2) + (after_start < (rows % outputs).unsqueeze(2)).long()


def _shuffled(groups: int, size: int, generator: torch.Generator | None) -> Tensor:
    """A random order for every group; the natural one without a generator."""
    if generator is None:
        return torch.arange(size).expand(groups, size)
    return torch.rand(groups, size, generator=generator).argsort(1)
