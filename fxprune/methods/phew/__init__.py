"""PHEW: keeps the union of random input-output walks that prefer large weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.methods.phew.walks import Visits, Walks
from fxprune.paths.count import flow
from fxprune.scoring.contract import Method, Problem, Scores, fixed_magnitudes
from fxprune.scoring.layerwise import is_untouched, select_by_layer
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.select import select

NEVER = 2**31 - 1
"""The number of the first walk through a weight that no walk has passed."""
SMALLEST, LARGEST = 256, 1 << 16
"""Walks in a batch."""
WORTH = 0.05
"""Walking ends when a smaller share of all steps passes weights that no walk had passed before."""


def phew(*, kernel: bool = False) -> Method:
    """Paths with higher edge weights (Patil, Dovrolis 2021, arXiv 2010.11354).

    Walks go forward from the inputs and backward from the outputs by turns, through the kernel (j, i) with
    probability |W_ji|_1 / sum_j |W_ji|_1 forward and |W_ji|_1 / sum_i |W_ji|_1 backward, and through one
    weight of it with |w| / sum |w|. What they pass is kept, until the budget is met: every weight kept lies
    on a path. On any graph: where a path forks or meets another (residual sums, gates, attention), every way
    is as likely; see ``fxprune.methods.phew.walks``. Needs the weights, no data.

    Options:
        kernel: keep all weights of a kernel that a walk passes

    Thousands of walks are made at a time, each batch too small to overshoot. The last weights, fewer than
    would make a walk, close paths through channels that walks have passed. Deviations from the authors' code:
    skips, also identities, are ways of the real graph (there, identities are left out, and forward walks
    enter projections at the wrong channel); randomness is seeded. Once fewer than one step in twenty passes a
    weight that is still wanted (a low sparsity, weights of zero), the rest is drawn without replacement, with
    the probability of being passed by a walk that is as likely in any channel.

    Cost: grows with the number of weights that are kept, whatever the batch.
    When: at initialization, without data, where every weight kept should lie on a path.
    """

    def find(problem: Problem) -> Masks:
        if is_untouched(problem):
            return dict(problem.masks)
        sizes = {name: weight.detach().abs().float().cpu() for name, weight in problem.weights.items()}
        fixed = {name: size.cpu() for name, size in fixed_magnitudes(problem).items()}
        usable = {name: mask.cpu() for name, mask in problem.masks.items()}
        walks = Walks(problem.graph, {**sizes, **fixed}, usable)
        first = _first_visits(problem, walks, usable, kernel)
        scores = {name: _score(problem, first[name], sizes[name]) for name in first}
        if problem.granularity == WEIGHT and problem.budget.layers is None:
            _raise_closing_weights(problem, first, scores, sizes, fixed)
        scores = {name: score.to(problem.masks[name].device) for name, score in scores.items()}
        return _chosen(problem, scores)

    return Method(
        name="phew",
        find=find,
        needs=frozenset({"graph"}),
        summary="keeps the weights passed by random walks that prefer large weights; no data",
        paper="Patil and Dovrolis 2021, arXiv 2010.11354",
        scored=False,
    )


def _first_visits(problem: Problem, walks: Walks, usable: Masks, kernel: bool) -> dict[str, Tensor]:
    """The first walk through every weight (int32, ``NEVER`` for none), until the budget is met."""
    first = {name: torch.full(w.shape, NEVER, dtype=torch.int32) for name, w in problem.weights.items()}
    short = total = _missing(problem, first)
    done = 0
    percent, shown = iter(problem.progress(range(100), "phew", 100)), 0
    while short > 0 and walks.longest:
        number = min(LARGEST, max(SMALLEST, short // walks.longest))
        ids = torch.arange(done, done + number)
        done += number
        # Even walks go forward, odd ones backward; either kind takes its seeds in turn.
        for visits, offset in (
            (walks.forward(ids[::2] // 2, problem.generator), 0),
            (walks.backward(ids[::2] // 2, problem.generator), 1),
        ):
            _record(first, visits, offset, kernel, usable)
        before, short = short, _missing(problem, first)
        while shown < 100 * (total - max(short, 0)) // total:
            shown += 1
            next(percent, None)
        if before - short < WORTH * number * min(walks.longest, len(first)):
            break
    return first


def _record(first: dict[str, Tensor], visits: Visits, offset: int, kernel: bool, usable: Masks) -> None:
    """Enter the first walk through each weight; with ``kernel``, through each weight of its kernel."""
    for name, weights in visits.weights.items():
        if name not in first:
            continue
        flat, ids = first[name].view(-1), (2 * visits.walks[name] + offset).int()
        if kernel and first[name].dim() > 2:
            taps = first[name][0, 0].numel()
            weights = (weights // taps * taps).unsqueeze(1) + torch.arange(taps)
            ids = ids.unsqueeze(1).expand(weights.shape)
            allowed = usable[name].view(-1)[weights]
            weights, ids = weights[allowed], ids[allowed]
        flat.scatter_reduce_(0, weights.flatten(), ids.flatten(), "amin")


def _missing(problem: Problem, first: dict[str, Tensor]) -> int:
    """The number of weights that the budget still lacks, in all or summed over the layers that lack some."""
    passed = {name: int((walk < NEVER).sum()) for name, walk in first.items()}
    if problem.budget.layers is None:
        return problem.budget.total - sum(passed.values())
    return sum(max(0, number - passed[name]) for name, number in problem.budget.layers.items())


def _score(problem: Problem, first: Tensor, size: Tensor) -> Tensor:
    """Score weights that walks have passed from 2 to 3, early ones high, and the others from 0 to 1.

    Where all channels are equally likely, a weight is passed with the mean of its shares of its input's and
    of its output's weights. Waiting times that are exponential at this rate put weights in the order of a
    draw without replacement.
    """
    shares = size.double().flatten(1)
    by_output = shares / shares.sum(1, keepdim=True).clamp(min=1e-300) / len(shares)
    columns = size.double().transpose(0, 1).flatten(1)
    by_input = columns / columns.sum(1, keepdim=True).clamp(min=1e-300) / len(columns)
    rate = by_output.view(size.shape) + by_input.view(size.transpose(0, 1).shape).transpose(0, 1)
    noise = torch.rand(size.shape, generator=problem.generator, dtype=torch.float64).clamp(min=1e-300)
    waiting = -noise.log() / rate.clamp(min=1e-300)
    return torch.where(first < NEVER, 3 - first.double() / NEVER, 1 / (1 + waiting))


def _raise_closing_weights(
    problem: Problem, first: dict[str, Tensor], scores: Scores, sizes: Scores, fixed: Scores
) -> None:
    """Raise the scores of weights that close a path between channels that walks have passed.

    They fill the rest of the budget where the next walk would not fit. Scores change in place.
    """
    walk = torch.cat([walks[walks < NEVER] for walks in first.values()])
    if len(walk) <= problem.budget.total:
        return
    per_walk = torch.bincount(walk.long()).cumsum(0)
    whole = int((per_walk <= problem.budget.total).sum())
    masks = {name: walks < whole for name, walks in first.items()}
    if int(per_walk[whole - 1] if whole else 0) == problem.budget.total or not whole:
        return
    edges = {**fixed, **{name: mask.float() for name, mask in masks.items()}}
    closing = flow(problem.graph, edges, resolution="channel").gradients
    for name, mask in masks.items():
        known = problem.graph.kernels[name].live_taps
        candidates = (closing[name] > 0) & ~mask & problem.masks[name].cpu() & known
        partial = (first[name] == whole) * 0.1
        relative = sizes[name] / sizes[name].max().clamp(min=1e-30)
        low = torch.where(candidates, 2 + 1e-3 * relative.double() + partial, scores[name] / 3)
        scores[name] = torch.where(mask, scores[name] + 1, low)


def _chosen(problem: Problem, scores: Scores) -> Masks:
    layers = problem.budget.layers
    if layers is not None or problem.granularity != WEIGHT:
        return select_by_layer(problem, scores, layers or {}, "phew")

    return select(scores, problem.budget, within=problem.masks, method="phew")
