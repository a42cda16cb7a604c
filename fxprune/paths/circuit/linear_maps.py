"""Find the coefficients of a linear map by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxprune.paths.circuit.parts import Function, SparseMatrix

__all__ = ["coefficients", "matrices", "picked"]

PROBED = 256
"""The largest shorter side of a matrix that :func:`matrices` finds."""
DENSE_LIMIT = 2_000_000_000
"""Entries of the largest matrix that :func:`coefficients` looks through row by row."""
CHUNK = 4_000_000
"""Entries of the rows that are looked through at a time."""


def picked(probe: Tensor, result: Tensor) -> tuple[Tensor | None, float] | None:
    """``(index, c)`` with ``result = c * probe[index]`` (index None: the identity), if there are such."""
    if result.numel() == probe.numel() and result.numel():
        ratio = result / probe
        coefficient = float(ratio[0])
        if coefficient > 0 and bool((ratio - coefficient).abs().max() <= 1e-12 * coefficient):
            return None, float(f"{coefficient:.12g}")
    ordered, order = probe.sort()
    place = torch.searchsorted(ordered, result.contiguous()).clamp(max=probe.numel() - 1)
    if probe.numel() and torch.equal(ordered[place], result):
        return order[place], 1.0
    return None


def matrices(
    sizes: Sequence[int], function: Function, dtype: torch.dtype
) -> tuple[tuple[SparseMatrix, ...], int] | None:
    """The matrix of a linear function for each of its inputs, and their common height.

    None where some matrix has more than ``PROBED`` rows and columns.
    """
    zeros = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    height = function(zeros).numel()
    if any(min(size, height) > PROBED for size in sizes):
        return None
    found: list[SparseMatrix] = []
    for place, size in enumerate(sizes):

        def of_one(x: Tensor, place: int = place) -> Tensor:
            return function([*zeros[:place], x, *zeros[place + 1 :]])

        matrix = _columns(of_one, size) if size <= height else _rows(*_recorded(of_one, (size,)), 0, height)
        out, into = matrix.nonzero(as_tuple=True)
        found.append(SparseMatrix(out, into, matrix[out, into].to(dtype)))
    return tuple(found), height


def coefficients(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[SparseMatrix, int]:
    """The non-zero coefficients of a linear function of a tensor of ``shape``, and the size of its result.

    Most ops move entries: each output has one input (a gather, a broadcast), or each input one output (a
    reduction). Both are read off one run on labels, and checked on random numbers. Otherwise the rows of the
    matrix are computed one by one.

    Raises:
        ValueError: neither holds, and the matrix is too large.
    """
    x, y = _recorded(function, shape)
    inputs, outputs = x.numel(), y.numel()
    generator = torch.Generator().manual_seed(0x5EED)

    def run(values: Tensor) -> Tensor:
        with torch.no_grad():
            return function(values.reshape(shape)).flatten()

    def transposed(values: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(y, x, values.reshape(y.shape), retain_graph=True)
        return found.flatten()

    counts, partner = _only_partner(run, inputs, generator)
    if partner is not None:
        used = counts > 0
        return SparseMatrix(used.nonzero().flatten(), partner[used], counts[used]), outputs
    counts, partner = _only_partner(transposed, outputs, generator)
    if partner is not None:
        used = counts > 0
        return SparseMatrix(partner[used], used.nonzero().flatten(), counts[used]), outputs
    if inputs * outputs > DENSE_LIMIT:
        raise ValueError(f"an op has {inputs} x {outputs} channels and positions: too many for walks")
    parts = []
    step = max(1, CHUNK // max(inputs, outputs))
    for start in range(0, outputs, step):
        rows = _rows(x, y, start, min(start + step, outputs))
        row, column = rows.nonzero(as_tuple=True)
        parts.append((row + start, column, rows[row, column]))
    return SparseMatrix(*(torch.cat(column) for column in zip(*parts, strict=True))), outputs


def _only_partner(
    run: Callable[[Tensor], Tensor], size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """The coefficient of each result of ``run``, and the one entry of its argument that it depends on.

    The latter is None where some result depends on several entries.
    """
    counts = run(torch.ones(size, dtype=torch.float64))
    labels = run(torch.arange(1, size + 1, dtype=torch.float64))
    noise = torch.rand(size, generator=generator, dtype=torch.float64) + 1
    partner = (labels / counts.clamp(min=1e-300) - 1).round().long().clamp(0, size - 1)
    fits = torch.allclose(run(noise), counts * noise[partner], rtol=1e-9, atol=0)
    return counts, partner if fits else None


def _recorded(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An argument of ``shape``, and the result that autograd can differentiate."""
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        return x, function(x)


def _columns(function: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The matrix, by a run on each unit vector."""
    return torch.stack([function(unit) for unit in torch.eye(size, dtype=torch.float64)], 1)


def _rows(x: Tensor, y: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the matrix that takes ``x`` to ``y``."""
    units = torch.zeros(stop - start, y.numel(), dtype=torch.float64)
    units[torch.arange(stop - start), torch.arange(start, stop)] = 1
    (found,) = torch.autograd.grad(
        y, x, units.reshape(-1, *y.shape), retain_graph=True, is_grads_batched=True
    )
    return found.reshape(stop - start, x.numel())
