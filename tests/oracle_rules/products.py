"""Sums, products, contractions and the affine part of norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oracle_rules.duals import Dual, Setting, dual, linear_map, never_zero, product, rule, scaled, total
from oracle_rules.moves import move


@rule("sub", "subtract", "rsub")
def _sub(setting: Setting, x: Any, y: Any, *, alpha: float = 1) -> Dual:
    """x - mean(x) is the centring of a norm, hence x."""
    if alpha == 1:
        for whole, mean in ((x, y), (y, x)):
            if type(mean) is Dual and mean.mean_of is not None and mean.mean_of is whole:
                return whole.copy()
    return add(setting, x, y)


@rule("add", "maximum", "minimum", "fmax", "fmin")
def add(setting: Setting, x: Any, y: Any, *, alpha: float = 1) -> Dual:
    """Signs never cancel."""
    result = total(setting, x, y)
    for plain in (x, y):
        if isinstance(plain, Tensor) and type(plain) is not Dual and bool((plain == -math.inf).any()):
            result.blocked = (plain == -math.inf).expand(result.shape)
    return result


@rule("mul", "multiply")
def _mul(setting: Setting, x: Any, y: Any) -> Dual:
    result = scaled(setting, x, y)
    result.square = x is y
    return result


@rule("div", "divide", "true_divide")
def _div(setting: Setting, x: Any, y: Any, **kwargs: Any) -> Dual:
    """A denominator is never Zero."""
    return scaled(setting, x, never_zero(dual(setting, y)))


@rule("rdiv")
def _rdiv(setting: Setting, x: Any, y: Any) -> Dual:
    return _div(setting, y, x)


@rule("lerp")
def _lerp(setting: Setting, x: Any, y: Any, weight: Any) -> Dual:
    """x + weight * (y - x)."""
    weight = dual(setting, weight)
    return total(setting, scaled(setting, x, never_zero(weight)), scaled(setting, y, weight))


@rule("addcmul")
def _addcmul(setting: Setting, x: Any, y: Any, z: Any, *, value: float = 1) -> Dual:
    return total(setting, x, scaled(setting, y, z))


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(setting: Setting, input: Any, other: Any) -> Dual:
    """Batched matrix product."""
    return product(setting, torch.matmul, input, other)


@rule("rmatmul")
def _rmatmul(setting: Setting, x: Any, y: Any) -> Dual:
    return matmul(setting, y, x)


@rule("baddbmm")
def _baddbmm(
    setting: Setting, input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1
) -> Dual:
    multiplied = matmul(setting, batch1, batch2)
    return total(setting, input, multiplied) if beta else multiplied


@rule("addmm")
def _addmm(setting: Setting, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Dual:
    return _baddbmm(setting, input, mat1, mat2, beta=beta)


@rule("addmv")
def _addmv(setting: Setting, input: Any, mat: Any, vec: Any, *, beta: float = 1, alpha: float = 1) -> Dual:
    return _baddbmm(setting, input, mat, vec, beta=beta)


@rule("einsum")
def _einsum(setting: Setting, equation: str, *operands: Any) -> Dual:
    one = len(operands) == 1 and isinstance(operands[0], tuple | list)
    factors = operands[0] if one else operands
    if len(factors) == 1:
        return linear_map(setting, factors[0], lambda t: torch.einsum(equation, t))
    return product(setting, lambda *parts: torch.einsum(equation, *parts), *factors)


@rule("tensordot")
def _tensordot(setting: Setting, x: Any, y: Any, dims: Any = 2) -> Dual:
    return product(setting, lambda a, b: torch.tensordot(a, b, dims), x, y)


@rule("linear")
def linear(setting: Setting, input: Any, weight: Any, bias: Any = None) -> Dual:
    """`F.linear`."""
    result = product(setting, F.linear, input, weight)
    return result if bias is None else total(setting, result, bias)


@rule("bilinear")
def _bilinear(setting: Setting, x: Any, y: Any, weight: Any, bias: Any = None) -> Dual:
    result = product(setting, F.bilinear, x, y, weight)
    return result if bias is None else total(setting, result, bias)


@rule("embedding")
def _embedding(setting: Setting, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Dual:
    """A constant, unless the integers are an input of the network: then the paths start here."""
    rows = dual(setting, weight).value[input]
    return Dual.make(rows, rows.detach() * setting.start if id(input) in setting.integers else None)


def _affine(setting: Setting, x: Dual, weight: Any, bias: Any, dims: int) -> Dual:
    """The affine part of a norm; `dims` dimensions follow the channels."""
    for operand, join in ((weight, scaled), (bias, total)):
        if operand is not None:
            shaped = move(
                setting, Tensor.reshape, (dual(setting, operand), (*operand.shape, *[1] * dims)), {}
            )
            x = join(setting, x, shaped)
    return x.copy()


@rule("batch_norm", "instance_norm")
def _batch_norm(
    setting: Setting, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, *args: Any, **kwargs: Any,
) -> Dual:  # fmt: skip
    return _affine(setting, input, weight, bias, input.dim() - 2)


@rule("group_norm")
def _group_norm(
    setting: Setting,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Dual:
    return _affine(setting, input, weight, bias, input.dim() - 2)


@rule("layer_norm")
def _layer_norm(
    setting: Setting,
    input: Any,
    shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Dual:
    return _affine(setting, input, weight, bias, 0)


@rule("rms_norm")
def _rms_norm(
    setting: Setting, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Dual:
    return _affine(setting, input, weight, None, 0)
