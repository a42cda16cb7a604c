"""The lemmas of ``benchmarks/path_bound.py``, against all cases of small ones."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bound() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "path_bound.py"
    spec = importlib.util.spec_from_file_location("path_bound", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["path_bound"] = module
    spec.loader.exec_module(module)
    return module


def image_norm(x: np.ndarray, level) -> float:
    y = x * np.outer(level.weights, level.weights)
    parts = [np.linalg.norm(y[a::2, b::2]) for a, b in itertools.product((0, 1), (0, 1))]
    return max(float(np.linalg.norm(y)), level.k * float(max(parts)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "before", "after"),
    [
        pytest.param(1, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        (1, 1.3, 1.5),
        (2, 2, 1),
    ],
)
def test_no_kernel_enlarges_an_image_by_more_than_its_table_says(bound, stride, before, after):
    rng = np.random.default_rng(0)
    source = bound.Level(np.exp(0.3 * rng.standard_normal(8)), before)
    target = bound.Level(np.exp(0.3 * rng.standard_normal(8 // stride)), after)
    table = bound.table(source, target, stride)
    for taps, size in zip(bound.SETS, bound.SIZE, strict=True):
        x = rng.random((8, 8)) ** 4
        for _ in range(5):
            y = sum(t * part for t, part in zip(taps, bound.shifts(x, stride), strict=True))
            assert image_norm(y, target) <= table[size] * image_norm(x, source)
            wide = np.zeros((8, 8))
            wide[::stride, ::stride] = y * np.outer(target.weights, target.weights) ** 2
            back = reversed(bound.shifts(wide, 1))
            x = sum(t * part for t, part in zip(taps, back, strict=True))
            x = x / np.outer(source.weights, source.weights) ** 2 / max(float(x.max()), 1e-9)


def test_no_split_of_the_taps_makes_more_than_the_bound(bound):
    rng = np.random.default_rng(1)
    for _ in range(5):
        gains = np.concatenate([[0], np.cumsum(rng.random(9) + 0.5)])
        weights = -np.sort(-rng.random(3))
        grid = bound.Grid(3, 4)
        after = bound.Value(grid, grid.points @ weights, float(np.linalg.norm(weights)))
        pieces = bound.majorant(gains, 3)
        before = bound.before(grid, after, 7, pieces, bound.frobenius(gains, 7))
        for x in -np.sort(-rng.random((4, 3)), axis=1):
            claimed = float(before(x[None])[0])
            for split in itertools.product(range(8), repeat=5):
                if sum(split) <= 7:
                    counts = np.array([*split, 7 - sum(split)]).reshape(2, 3)
                    made = -np.sort(-(gains[counts] @ x))
                    assert made @ weights[:2] <= claimed * (1 + 1e-12)


def test_values_grow_when_channels_are_merged(bound):
    grid, rng = bound.Grid(3, 4), np.random.default_rng(2)
    weights = np.array([3.0, 2.0, 0.5, 0.2, 0.1])
    after = bound.Value(grid, grid.points @ weights[:3], float(np.linalg.norm(weights)))
    x = -np.sort(-rng.random((100, 5)), axis=1)
    assert (after(x) >= x @ weights - 1e-9).all()
