"""Matrices taken as a whole: inverses, determinants, factors; and the cross product."""

from __future__ import annotations

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
            " solve solve_triangular svd svdvals",
        ),
    )
    for name in names.split()
]
_METHODS = ("cholesky", "det", "inverse", "logdet", "matrix_exp", "pinverse", "slogdet", "svd", "qr")


@table.rule(*dict.fromkeys((*_OF_MATRICES, *_METHODS)))
def of_matrices(context: Context, *args: Any, **kwargs: Any) -> Any:
    """Every entry of a matrix reaches every entry of the result; one that is zero counts, too."""
    build = context.build
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, (ir.Value, Constant))]
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

    result = context.result
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
