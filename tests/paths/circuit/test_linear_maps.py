"""Coefficients of linear maps against matrices that are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxprune.paths.circuit import linear_maps
from fxprune.paths.circuit.linear_maps import coefficients, matrices, picked

MATRIX = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)


def matrix_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    entries, outputs = coefficients(function, shape)
    found = torch.zeros(outputs, torch.Size(shape).numel(), dtype=torch.float64)
    found[entries.out, entries.into] = entries.value
    return found


def test_coefficients_of_a_matrix() -> None:
    assert torch.equal(matrix_of(lambda x: MATRIX @ x, (3,)), MATRIX)


def test_coefficients_of_a_matrix_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_maps, "CHUNK", 6)
    matrix = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(matrix_of(lambda x: matrix @ x, (3,)), matrix)


def test_a_matrix_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_maps, "DENSE_LIMIT", 5)
    with pytest.raises(ValueError, match="an op has 3 x 2 channels and positions"):
        coefficients(lambda x: MATRIX @ x, (3,))
    assert coefficients(lambda x: x.flip(0), (3,))[1] == 3, "no limit where each output has one input"


def test_each_output_has_one_input() -> None:
    moved, outputs = coefficients(lambda x: 2 * torch.cat([x[1:], x[:1] * 0, x[:1]]), (3,))
    assert (moved.out.tolist(), moved.into.tolist(), moved.value.tolist()) == (
        [0, 1, 3],
        [1, 2, 0],
        [2, 2, 2],
    )
    assert outputs == 4


def test_each_input_has_one_output() -> None:
    summed, outputs = coefficients(lambda x: x[:, :2].sum(0) / 4, (2, 3))
    assert (summed.out.tolist(), summed.into.tolist()) == ([0, 1, 0, 1], [0, 1, 3, 4])
    assert (summed.value.tolist(), outputs) == ([0.25] * 4, 2)


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_of_several_inputs(turned: bool) -> None:
    matrix = MATRIX.T if turned else MATRIX
    found = matrices([matrix.shape[1], 1], lambda xs: matrix @ xs[0] + 5 * xs[1], torch.float32)
    assert found is not None
    (first, second), height = found
    assert height == len(matrix)
    assert first.value.dtype == torch.float32
    rebuilt = torch.zeros(matrix.shape)
    rebuilt[first.out, first.into] = first.value
    assert torch.equal(rebuilt, matrix.float())
    assert (second.out.tolist(), second.value.tolist()) == (list(range(height)), [5.0] * height)


def test_matrices_that_are_large_both_ways_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_maps, "PROBED", 2)
    assert matrices([3], lambda xs: xs[0].flip(0), torch.float64) is None
    assert matrices([2], lambda xs: xs[0].repeat(3), torch.float64) is not None


def test_picked_entries() -> None:
    probe = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    assert picked(probe, 0.5 * probe) == (None, 0.5)
    found = picked(probe, probe[[2, 2, 0, 1]])
    assert found is not None
    assert found[0] is not None
    assert (found[0].tolist(), found[1]) == ([2, 2, 0, 1], 1.0)
    assert picked(probe, probe[[0, 1, 2]] + 1e-6) is None
    assert picked(probe, 2 * probe[[1, 0, 2]]) is None, "a permutation with a factor is a matrix"
