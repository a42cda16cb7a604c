"""In which order channel groups are removed, and which must stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd, lcm, prod

import torch
from torch import Tensor

from fxprune.channels.cost import CostModel
from fxprune.channels.groups import Groups

__all__ = ["by_class", "by_worth", "kinds", "round_up", "turns"]

STEP = 0.04
"""The share of what is to be saved that goes between two updates of what every group costs."""


def by_worth(worth: Tensor, cost: CostModel, alive: Tensor, open_: Tensor, limit: float) -> Tensor:
    """Return the groups that may go in the order of ``worth`` per cost, as many as meet ``limit``.

    What a group costs depends on which others are left, so costs are brought up to date after every few
    groups. Of equal groups the later one goes first.
    """
    staying, open_ = alive.clone(), open_.clone()
    left = cost.left(staying)
    step = max(left - limit, 0.0) * STEP
    order = []
    while left > limit and bool(open_.any()):
        saved = cost.towards(staying, max(limit, left - step))
        indices = (open_ & (saved > 0)).nonzero().flatten().flip(0)
        if not len(indices):
            break
        ratio = worth[indices] / saved[indices].clamp(min=1e-12)
        indices = indices[ratio.argsort(stable=True)]
        number = int(torch.searchsorted(saved[indices].cumsum(0), step)) + 1
        taken = indices[:number]
        order.append(taken)
        open_[taken] = False
        staying[taken] = False
        left = cost.left(staying)
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)


def by_class(score: Tensor, classes: Tensor, ratios: Mapping[int, float], open_: Tensor) -> Tensor:
    """Return the groups that may go so that every class loses its lowest in proportion, by their turns."""
    indices = open_.nonzero().flatten().flip(0)
    return indices[turns(score, classes, ratios)[indices].argsort(stable=True)]


def turns(score: Tensor, classes: Tensor, ratios: Mapping[int, float]) -> Tensor:
    """Return, for every group, when it goes, so that every class loses its lowest in proportion.

    A class with the ratio r keeps a fraction t r of its groups (1 where it has no ratio); t falls until the
    budget is met. The i-th lowest of n groups goes when t r < 1 - i / n; its turn is 1 / t.

    >>> turns(torch.tensor([3.0, 1.0, 9.0, 8.0]), torch.tensor([0, 0, 1, 1]), {}).tolist()
    [2.0, 1.0, 2.0, 1.0]
    """
    when = torch.zeros_like(score, dtype=torch.float64)
    for name in torch.unique(classes).tolist():
        members = (classes == name).nonzero().flatten()
        ranks = score[members].argsort(stable=True).argsort(stable=True).double()
        when[members] = ratios.get(name, 1.0) / (1 - ranks / len(members)).clamp(min=1e-12)
    return when


def kinds(groups: Groups) -> Tensor:
    """Number the kinds of groups: two are of one kind if their rows and columns are of like parameters.

    Only groups of one kind are alike in what their scores mean (isomorphic pruning, Fang et al. 2024,
    arXiv 2407.04616). Parameters are alike if they have the same taps and are grouped, or not.
    """
    found: list[list[tuple[object, ...]]] = [[] for _ in range(groups.count)]
    for axis, table in (("out", groups.rows), ("in", groups.columns)):
        for name, numbers in table.items():
            kernels = groups.graph.kernels[name]
            like = (axis, tuple(kernels.shape[2:]), kernels.groups > 1, kernels.transposed)
            for group in torch.unique(numbers[numbers >= 0]).tolist():
                found[group].append(like)
    number: dict[tuple[tuple[object, ...], ...], int] = {}
    return torch.tensor([number.setdefault(tuple(sorted(one, key=repr)), len(number)) for one in found])


def round_up(groups: Groups, multiple: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that keeps more groups, so that the outputs of each parameter are a multiple.

    It takes the groups that stay (bool) and their ranks (higher: rather keep). A family that has no such
    number below its width keeps all.
    """
    families = [
        ((groups.families == family).nonzero().flatten(), _quantum(groups, family, multiple))
        for family in torch.unique(groups.families).tolist()
    ]

    def rounded(staying: Tensor, rank: Tensor) -> Tensor:
        staying = staying.clone()
        for members, quantum in families:
            number = int(staying[members].sum())
            missing = -number % quantum
            if missing:
                gone = members[~staying[members]]
                back = gone[rank[gone].argsort(descending=True, stable=True)[:missing]]
                staying[back] = True
        return staying

    return rounded


def _quantum(groups: Groups, family: int, multiple: int) -> int:
    """The number of groups that makes every parameter of a family lose a multiple of channels.

    Its outputs and its inputs both do, and those along each axis where a parameter has several.
    """
    quantum = 1
    for side, table in enumerate((groups.rows, groups.columns)):
        for name, numbers in table.items():
            own = numbers[numbers >= 0]
            if len(own) and int(groups.families[own[0]]) == family:
                kernels = groups.graph.kernels[name]
                copies = (
                    1 if kernels.axes is None else prod(kernels.shape[a] for a in kernels.axes[side][:-1])
                )
                per_group = max(1, len(own) // len(torch.unique(own)) // copies)
                quantum = lcm(quantum, multiple // gcd(per_group, multiple))
    return quantum
