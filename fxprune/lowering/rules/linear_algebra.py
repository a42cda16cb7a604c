"""Matrices taken as a whole: inverses, determinants, factors; and the cross product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import Context, RuleTable

__all__ = ["table"]

table = RuleTable()

_OF_MATRICES = [
    getattr(home, name)
    for home, names in (
        (torch, "cholesky det inverse logdet matrix_exp pinverse slogdet svd qr"),
        (
            torch.linalg,
            "cholesky det eigh eigvalsh eigvals inv lstsq matrix_exp matrix_power matrix_rank pinv qr slogdet"
            " svd svdvals",
        ),
    )
    for name in names.split()
]
_METHODS = ("cholesky", "det", "inverse", "logdet", "matrix_exp", "pinverse", "slogdet", "svd", "qr")


@table.rule(*dict.fromkeys((*_OF_MATRICES, *_METHODS)))
def of_matrices(context: Context, *args: Any, **kwargs: Any) -> Any:
    """Every entry of a matrix reaches every entry of the result; one that is zero counts, too."""
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, (ir.Value, Constant))]
    return _mixed(context, operands, context.result)


@table.rule(torch.linalg.solve, torch.linalg.solve_triangular)
def solve(context: Context, a: Any, b: Any, *, left: bool = True, **kwargs: Any) -> Any:
    """``X = inverse(A) B``: the columns of B go through it each by itself; the rows, with ``left=False``."""
    rank = len(context.shape)
    sizes = tuple(a.shape), tuple(b.shape)
    if any(len(size) != rank for size in sizes) or rank < 2:
        return _mixed(context, [a, b], context.result)
    inverse = _mixed(context, [a], torch.empty(sizes[0], device="meta"))
    batch = "".join(chr(ord("a") + place) for place in range(rank - 2))
    first, second = (inverse, context.build.materialise(b))[:: 1 if left else -1]
    return context.build.mix(f"{batch}xy,{batch}yz->{batch}xz", first, second, context.shape)


def _mixed(context: Context, operands: Sequence[Any], result: Any) -> Any:
    """Let every entry of the operands' matrices reach every entry of a result."""
    build = context.build
    samples = [_of_sample(context, x) for x in operands]

    def entries(result: Tensor) -> ir.Value:
        shape = tuple(result.shape)
        parts = []
        for value in samples:
            kept = [1] * len(shape)
            batch = min(len(value.shape), len(shape))
            kept[:batch] = value.shape[:batch]
            reshaped = build.gather(TensorFunction.of("reshape", PREVIOUS, kept), [value], kept)
            parts.append(build.affine(reshaped, shape))
        return parts[0] if len(parts) == 1 else build.sum(parts, shape)

    return entries(result) if isinstance(result, Tensor) else tuple(entries(part) for part in result)


def _of_sample(context: Context, x: Any) -> ir.Value:
    """All entries of each matrix as one."""
    build, value = context.build, context.build.materialise(x)
    last = range(max(0, len(value.shape) - 2), len(value.shape))
    value = build.map(value, floor=True, axes=tuple(last))
    return build.reduce(value, "sum", tuple(last), False, value.shape[: last.start])


@table.rule(torch.cross, "cross", torch.linalg.cross)
def cross(context: Context, a: Any, b: Any, dim: int = -1) -> ir.Value:
    """``y[i] = a[i + 1] b[i + 2] - a[i + 2] b[i + 1]``."""
    build, shape = context.build, context.shape

    def rolled(x: Any, places: int) -> ir.Value:
        turn = TensorFunction.of("expand", PREVIOUS, shape).then("roll", PREVIOUS, places, dim)
        return build.gather(turn, [build.materialise(x)], shape)

    products = [build.gate(rolled(a, -i), rolled(b, -j), shape) for i, j in ((1, 2), (2, 1))]
    return build.sum(products, shape)
