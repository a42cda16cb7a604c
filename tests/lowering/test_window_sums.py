"""Sums over windows, one window at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxprune.lowering.periodic import fold_periodically
from fxprune.lowering.window_sums import Geometry, adaptive_sum, resample, running_sum, window_sum


def by_hand(x: Tensor, geometry: Geometry, periodic: bool) -> Tensor:
    """Add up, for every output, the entries at its taps: zero outside, or from the other side."""
    out = torch.zeros(geometry.out)
    for place in itertools.product(*map(range, geometry.out)):
        for tap in itertools.product(*map(range, geometry.kernel)):
            at = [
                p * s - b + t * d
                for p, s, b, t, d in zip(
                    place, geometry.stride, geometry.padding, tap, geometry.dilation, strict=True
                )
            ]
            inside = all(0 <= a < n for a, n in zip(at, x.shape, strict=True))
            if periodic or inside:
                out[place] += x[tuple(a % n for a, n in zip(at, x.shape, strict=True))]
    return out


GEOMETRIES = [
    Geometry((3,), (1,), (1,), (1,), (7,), (7,)),
    Geometry((2,), (2,), (0,), (1,), (7,), (3,)),  # the last entry is in no window
    Geometry((2,), (2,), (0,), (1,), (7,), (4,)),  # the last window hangs over
    Geometry((3,), (2,), (1,), (2,), (8,), (3,)),
    Geometry((3, 2), (2, 1), (1, 0), (1, 2), (5, 6), (3, 4)),
    Geometry((2, 2, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), (3, 4, 2), (2, 3, 2)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("periodic", [False, True])
def test_every_window_adds_up_its_taps(geometry: Geometry, periodic: bool) -> None:
    x = torch.randint(0, 9, (2, *geometry.size)).float()
    found = window_sum(x, geometry, periodic=periodic)
    for one, expected in zip(found, x, strict=True):
        assert torch.equal(one, by_hand(expected, geometry, periodic))


@pytest.mark.parametrize(("size", "out"), [((5,), (2,)), ((5, 6), (3, 4)), ((4, 3, 2), (2, 2, 2))])
def test_adaptive_windows(size: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Output ``i`` of ``m`` covers the entries from floor(i n / m) to ceil((i + 1) n / m)."""
    x = torch.randint(0, 9, (2, *size)).float()
    found = adaptive_sum(x, out)
    for place in itertools.product(*map(range, out)):
        cut = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, size, out, strict=True))
        torch.testing.assert_close(found[(slice(None), *place)], x[(slice(None), *cut)].flatten(1).sum(1))


def test_sums_of_what_is_before_and_after() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert running_sum(x, 1).tolist() == [[1, 3, 6]]
    assert running_sum(x, 1, backwards=True).tolist() == [[6, 5, 3]]


def test_matrices_along_the_last_axes() -> None:
    x, rows, columns = torch.rand(2, 3, 4), torch.rand(3, 5), torch.rand(4, 2)
    torch.testing.assert_close(resample(x, [rows, columns]), rows.T @ x @ columns)


def test_what_lies_beyond_an_end_is_added_at_the_other() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # two before the first of three
    assert fold_periodically(x, 0, 2, 3).tolist() == [3.0, 1.0 + 4.0, 2.0 + 5.0]
