"""The counts of one layer against an integer solver."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from fxprune.methods.npb.assignment import most_paths, solve

RANDOM = [
    # groups, inputs, outputs, budget, cap, least
    *(
        (1, i, o, n, k, m)
        for i, o, n in ((3, 4, 5), (4, 3, 9), (2, 5, 3))
        for k, m in ((1, 1), (3, 2), (9, 1))
    ),
    (2, 2, 3, 7, 2, 1),
    (3, 1, 2, 4, 3, 2),
    (2, 3, 2, 1, 2, 1),
    (1, 4, 4, 40, 3, 1),
]


def value(
    counts: torch.Tensor, paths: torch.Tensor, n: int, alpha: float, beta: float, cap: int, m: int
) -> float:
    """The programme's objective, from its formulas; C without its constant."""
    counts = counts.double()
    nodes = counts.sum(2).clamp(max=m).sum() + counts.sum(1).clamp(max=m).sum()
    size = paths.numel() + counts.shape[0] * counts.shape[2]
    taken = (paths.unsqueeze(2) * counts).sum() / most_paths(paths, counts.shape[2], n, cap)
    return float(alpha * nodes / size + (1 - alpha) * taken + beta * float((counts > 0).sum()) / n)


def optimum(paths: torch.Tensor, outputs: int, n: int, alpha: float, beta: float, cap: int, m: int) -> float:
    """The same optimum by HiGHS: variables M, kernel in use (y <= M), rows (u <= sum), columns (v <= sum)."""
    groups, inputs = paths.shape
    cells = list(itertools.product(range(groups), range(inputs), range(outputs)))
    rows = list(itertools.product(range(groups), range(inputs)))
    columns = list(itertools.product(range(groups), range(outputs)))
    number = 2 * len(cells) + len(rows) + len(columns)
    gain, upper = np.zeros(number), np.zeros(number)
    size, top = len(rows) + len(columns), most_paths(paths, outputs, n, cap)
    bounds: list[np.ndarray] = []
    for c, (g, i, _) in enumerate(cells):
        gain[c], upper[c] = (1 - alpha) * float(paths[g, i]) / top, cap
        gain[len(cells) + c], upper[len(cells) + c] = beta / n, 1
        bounds.append(np.zeros(number))
        bounds[-1][[len(cells) + c, c]] = 1, -1
    for r, which in enumerate([(g, i, None) for g, i in rows] + [(g, None, j) for g, j in columns]):
        place = 2 * len(cells) + r
        gain[place], upper[place] = alpha / size, m
        line = np.zeros(number)
        line[place] = 1
        for c, cell in enumerate(cells):
            if all(w is None or w == x for w, x in zip(which, cell, strict=True)):
                line[c] = -1
        bounds.append(line)
    budget = np.zeros(number)
    budget[: len(cells)] = 1
    found = milp(
        -gain,
        integrality=np.ones(number),
        bounds=Bounds(0, upper),
        constraints=[LinearConstraint(np.array(bounds), ub=0), LinearConstraint(budget, ub=n)],
    )
    assert found.success
    return float(-found.fun)


@pytest.mark.parametrize(("groups", "inputs", "outputs", "n", "cap", "least"), RANDOM)
@pytest.mark.parametrize(("alpha", "beta"), [(0.99, 0.001), (0.01, 1.0), (0.5, 0.1), (0.0, 0.0), (1.0, 0.0)])
def test_the_programme_is_solved_to_the_solvers_optimum(
    groups: int, inputs: int, outputs: int, n: int, cap: int, least: int, alpha: float, beta: float
) -> None:
    generator = torch.Generator().manual_seed(groups * 100 + inputs * 10 + n)
    paths = torch.randint(1, 9, (groups, inputs), generator=generator).double()
    counts = solve(paths, outputs, n, alpha=alpha, beta=beta, cap=cap, least=least, generator=generator)
    assert int(counts.sum()) == min(n, cap * groups * inputs * outputs)
    assert int(counts.max()) <= cap
    assert int(counts.min()) >= 0
    mine = value(counts, paths, n, alpha, beta, cap, least)
    assert mine == pytest.approx(optimum(paths, outputs, n, alpha, beta, cap, least), abs=1e-9)


def test_most_paths_of_a_budget_below_one_inputs_share() -> None:
    # The published code sums all inputs there and finds 11 (methods.md 3.13).
    assert most_paths(torch.tensor([[3.0, 1.0]]), 2, 1, 1) == 3


def test_the_optimum_switches_at_four_sevenths() -> None:
    def rows(alpha: float) -> list[int]:
        found = solve(torch.tensor([[3.0, 1.0]]), 2, 2, alpha=alpha, beta=0.0, cap=1)
        return found[0].sum(1).tolist()

    assert rows(4 / 7 - 1e-6) == [2, 0]
    assert rows(4 / 7 + 1e-6) == [1, 1]


def test_inputs_without_paths_come_last() -> None:
    counts = solve(torch.tensor([[0.0, 2.0]]), 2, 3, alpha=1.0, beta=0.0, cap=1)
    assert counts.tolist() == [[[1, 0], [1, 1]]] or counts[0].sum(1).tolist() == [1, 2]
