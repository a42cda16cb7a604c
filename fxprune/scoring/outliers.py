"""Share a budget over layers by their outliers: weights whose inputs make them far larger than the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from fxprune.scoring.contract import Problem
from fxprune.scoring.data import seeded, stream
from fxprune.scoring.gradients import masked
from fxprune.scoring.inputs import input_norms
from fxprune.sparsity.budget import Budget, apportion
from fxprune.sparsity.masks import kept

__all__ = ["outlier_budget"]

BATCHES = 8
"""Batches of the data that are looked at, at most."""


def outlier_budget(problem: Problem, *, times: float = 5.0, spread: float = 0.08) -> Budget:
    """Give layers with more outliers more weights: OWL (Yin et al. 2024, arXiv 2310.05175).

    A weight is an outlier where ``|w_ij| * ||x_j||_2`` is more than ``times`` the mean of its layer (the
    paper's M). Densities of layers are linear in their shares of outliers, and differ by 2 ``spread`` at most
    (the paper's lambda). The paper takes all matrices of a block of a language model together; here every
    parameter is a layer.

    Args:
        problem: whose budget says how many weights stay; its ``data`` is run in evaluation mode.
        times, spread: the paper's M and lambda.

    Returns:
        The budget with a number for every layer; the total is that of ``problem``.

    Raises ``ValueError`` for data that can be read only once, which the method needs too.
    """
    if isinstance(problem.data, Iterator):
        raise ValueError("data: budget='owl' and the method both read it; pass a list, not an iterator")
    with seeded(problem):
        some = list(islice(stream(problem.data, problem.device, "owl"), BATCHES))
    weights = masked(problem, problem.masks)
    norms = input_norms(problem, weights, some, "owl")
    shares = {}
    for name, mask in problem.masks.items():
        score = (problem.weights[name].abs() * norms.of(name))[mask].double()
        shares[name] = float((score > times * score.mean()).double().mean()) if score.numel() else 0.0
    total, left = problem.budget.total, kept(problem.masks)
    low, width = min(shares.values()), max(shares.values()) - min(shares.values())
    offsets = {name: 2 * spread * (share - low) / width if width else 0.0 for name, share in shares.items()}
    mean = sum(offsets[name] * left[name] for name in left) / sum(left.values())
    density = total / sum(left.values())
    wanted = {name: max(density + offsets[name] - mean, 1e-6) * left[name] for name in left}
    layers = apportion(total, wanted, left)
    return replace(problem.budget, layers=layers)
