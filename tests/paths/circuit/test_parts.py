"""Matrices of a circuit against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.paths.circuit.parts import Contraction, Kept


def whole(counts: Tensor) -> Tensor:
    return counts


def turned(counts: Tensor) -> Tensor:
    return counts.t()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("view", [whole, turned])
def test_a_contraction_and_its_derivatives(groups: int, transposed: bool, rows: int, view: object) -> None:
    """The output, the slope of the input, and that of the counts, written and added."""
    if view is turned and groups > 1:
        return  # groups are read from the parameter itself
    operand = turned if view is turned else whole
    counts = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    part = Contraction(1, (0,), "weight", operand, groups, transposed, rows, operand is whole)
    read = operand(counts)
    matrices = read.view(groups, -1, read.shape[1])
    matrices = matrices.mT if transposed else matrices
    x = torch.rand(rows, groups, matrices.shape[2], dtype=torch.float64, requires_grad=True)
    y = torch.einsum("rgi,goi->rgo", x, matrices)
    slope = torch.rand_like(y)
    by_input, by_counts = torch.autograd.grad(y, (x, counts), slope)

    part.read(counts.detach())
    flat, given = x.detach().flatten(), slope.flatten()
    torch.testing.assert_close(part.forward(flat), y.detach().flatten())
    torch.testing.assert_close(part.backward(given), by_input.flatten())
    found = torch.full((4, 6), 7.0, dtype=torch.float64)
    part.spread(given, flat, found, add=False)
    torch.testing.assert_close(found, by_counts)
    part.spread(given, flat, found, add=True)
    torch.testing.assert_close(found, 2 * by_counts)


def test_counts_given_by_the_places_of_what_is_kept() -> None:
    counts = (torch.rand(4, 6) < 0.4).double()
    out, into = counts.nonzero(as_tuple=True)
    part = Contraction(1, (0,), "weight", whole, 1, False, 2, True)
    part.read(Kept(out, into, (4, 6)))
    x, slope = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    torch.testing.assert_close(part.forward(x.flatten()), (x @ counts.t()).flatten())
    torch.testing.assert_close(part.backward(slope.flatten()), (slope @ counts).flatten())
