"""Counts of one layer against enumeration and against taking weights one by one."""

import itertools
import math

import numpy as np
import pytest

from fxprune.methods.balance.layer_moves import cover_channels, fill_by_gain


@pytest.mark.parametrize("seed", range(4))
def test_filling_by_gain_is_optimal_by_enumeration(seed: int) -> None:
    random = np.random.default_rng(seed)
    gain = random.random((1, 3, 2))
    cap = random.integers(1, 3, (1, 3, 2)).astype(float)
    covered = np.zeros(gain.shape, dtype=bool)
    covered[0, 2, 1] = True
    found = fill_by_gain(covered, gain, cap, 5, path_weight=1.0, kernel_bonus=seed / 4)

    def worth(counts: np.ndarray) -> float:
        return float((counts * gain).sum() * (1 + 1e-6) + seed / 4 * (counts > 0).sum())

    best = -math.inf
    for values in itertools.product(*[range(int(c) + 1) for c in cap.ravel()]):
        counts = np.array(values, dtype=float).reshape(gain.shape)
        if counts.sum() == 5 and counts[0, 2, 1] >= 1:
            best = max(best, worth(counts))
    assert found.sum() == 5
    assert worth(found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_filling_a_large_layer_is_taking_weights_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    gain = random.integers(0, 4, (2, 30, 20)).astype(float)  # with ties, and kernels on no path
    cap = random.integers(0, 4, gain.shape).astype(float)
    covered = (random.random(gain.shape) < 0.01) & (cap > 0)
    number = int(covered.sum()) + 400 * (seed % 2) + 30
    found = fill_by_gain(covered, gain, cap, number, path_weight=1.0, kernel_bonus=1.0)

    naive = covered.astype(float)
    for _ in range(number - int(covered.sum())):
        worth = gain * (1 + 1e-6) + (naive == 0) * (gain > 0)
        worth[naive >= cap] = -1.0
        # Ties go to first weights of kernels, in order, then to kernels that have been begun.
        tied = worth.ravel() == worth.max()
        first = np.flatnonzero(tied & (naive.ravel() == 0))
        naive.ravel()[first[0] if len(first) else np.flatnonzero(tied)[0]] += 1
    assert (found == naive).all()


def test_covers_touch_all_that_is_asked_with_as_few_kernels_as_can_be() -> None:
    random = np.random.default_rng(0)
    gain = random.random((2, 5, 4))
    inputs, outputs = random.random((2, 4)) < 0.7, random.random((2, 5)) < 0.7
    chosen = cover_channels(inputs, outputs, gain, np.ones(gain.shape), 20, random)
    assert bool((chosen.any(1) | ~inputs).all())
    assert bool((chosen.any(2) | ~outputs).all())
    for group in range(2):
        assert chosen[group].sum() <= max(inputs[group].sum(), outputs[group].sum())
    fewer = cover_channels(inputs, outputs, gain, np.ones(gain.shape), 3, random)
    assert fewer.sum() == 3
