"""Operations with one operand: activations, casts, reductions, statistics, constants."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oracle_rules.duals import (
    Dual,
    Setting,
    UnknownOpError,
    constant,
    dual,
    finished,
    linear_map,
    never_zero,
    paths_of,
    rule,
    scaled,
    total,
)
from oracle_rules.moves import move


@rule(
    *"""relu relu6 leaky_relu gelu silu mish hardswish elu selu celu tanh hardtanh softsign tanhshrink
    softshrink hardshrink rrelu prelu threshold abs neg negative positive sqrt log1p expm1 sin asin sinh asinh
    atan erf sgn sign dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout contiguous detach alias data real conj nan_to_num to float double half
    bfloat16 type type_as cuda cpu normalize local_response_norm""".split()
)
def _same(setting: Setting, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Zero stays Zero: activations that vanish at zero, casts, dropout in eval, division by a statistic."""
    if type(x) is not Dual:
        return x.to(setting.dtype)  # a plain tensor cast to the type of a dual
    result = x.copy()
    return result if x.base is None else result.seen_through(x)


@rule("clone")
def _clone(setting: Setting, x: Dual, **kwargs: Any) -> Dual:
    """Memory of its own."""
    return x.copy()


@rule(
    "sigmoid",
    "hardsigmoid",
    "log_softmax",
    "softmin",
    "logsigmoid",
    "log_sigmoid",
    "softplus",
    "exp",
    "exp2",
    "cos",
    "cosh",
)
def _never_zero(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """f(0) is not 0: 1 + x."""
    return never_zero(x)


@rule("reciprocal")
def _reciprocal(setting: Setting, x: Dual) -> Dual:
    """A denominator is never Zero."""
    return never_zero(x)


@rule("softmax")
def softmax(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """1 + x, elementwise; a pair that was set to -inf is Zero."""
    result = never_zero(x)
    if x.blocked is None:
        return result
    allowed = (~x.blocked).to(setting.dtype)
    return Dual.make(result.value * allowed, None if x.paths is None else x.paths * allowed)


@rule("glu")
def _glu(setting: Setting, x: Dual, dim: int = -1) -> Dual:
    left, right = move(setting, torch.chunk, (x, 2, dim), {})
    return scaled(setting, left, never_zero(right))


@rule("clamp", "clip")
def _clamp(setting: Setting, x: Dual, min: Any = None, max: Any = None) -> Dual:
    """Zero stays Zero unless the range excludes it."""
    above = isinstance(min, int | float) and min > 0
    below = isinstance(max, int | float) and max < 0
    return never_zero(x) if above or below else x.copy()


@rule("clamp_min")
def _clamp_min(setting: Setting, x: Dual, min: Any) -> Dual:
    return _clamp(setting, x, min=min)


@rule("clamp_max")
def _clamp_max(setting: Setting, x: Dual, max: Any) -> Dual:
    return _clamp(setting, x, max=max)


@rule("square")
def _square(setting: Setting, x: Dual) -> Dual:
    result = x.copy()
    result.square = True
    return result


@rule("pow")
def _pow(setting: Setting, x: Any, exponent: Any) -> Dual:
    if not isinstance(x, Dual) or not isinstance(exponent, int | float):
        raise UnknownOpError("no rule for a power whose exponent is a tensor")
    if exponent in (-0.5, 0):
        return constant(setting, x.shape)
    if exponent < 0:
        return never_zero(x)
    return _square(setting, x) if exponent == 2 else x.copy()


@rule("rsqrt")
def _rsqrt(setting: Setting, x: Dual) -> Dual:
    """One over a root is the statistic of a norm: a scale, no path."""
    return constant(setting, x.shape)


def _axes(dim: tuple[Any, ...], keepdim: bool, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """`x.sum(1, 2)`, `x.sum((1, 2), True)`, `x.sum(dim=1)`, `x.sum(axis=1)`."""
    if dim and isinstance(dim[-1], bool):
        dim, keepdim = dim[:-1], dim[-1]
    if len(dim) == 1:
        return dim[0], keepdim
    return (dim or kwargs.get("dim", kwargs.get("axis"))), keepdim


def _dims(x: Tensor, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(x.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


@rule("sum", "nansum")
def _sum(setting: Setting, x: Dual, *dim: Any, keepdim: bool = False, **kwargs: Any) -> Dual:
    axes, keepdim = _axes(dim, keepdim, kwargs)
    return linear_map(setting, x, lambda t: t.sum(_dims(t, axes), keepdim))


@rule("mean")
def _mean(setting: Setting, x: Dual, *dim: Any, keepdim: bool = False, **kwargs: Any) -> Dual:
    """A sum, as average pools are; the mean of a square is a second moment, a statistic."""
    result = _sum(setting, x, *dim, keepdim=keepdim, **kwargs)
    if x.square:
        return constant(setting, result.shape)
    result.mean_of = x
    return result


@rule("var", "std")
def _spread(setting: Setting, x: Dual, *dim: Any, keepdim: bool = False, **kwargs: Any) -> Dual:
    """A statistic: a scale, no path."""
    return constant(setting, _sum(setting, x, *dim[:2], keepdim=keepdim, **kwargs).shape)


@rule("var_mean", "std_mean")
def _moments(setting: Setting, x: Dual, *dim: Any, keepdim: bool = False, **kwargs: Any) -> tuple[Dual, Dual]:
    """Both are statistics: the mean that a norm subtracts is no path and no bias."""
    shape = _sum(setting, x, *dim[:2], keepdim=keepdim, **kwargs).shape
    return constant(setting, shape), constant(setting, shape, 0.0)


@rule("norm", "linalg_vector_norm", "linalg_norm")
def _norm(
    setting: Setting, x: Dual, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Dual:
    """A statistic."""
    return constant(setting, _sum(setting, x, _dims(x.value, dim), keepdim=keepdim).shape)


@rule("amax", "amin", "logsumexp")
def _extremum(setting: Setting, x: Dual, dim: Any = None, keepdim: bool = False) -> Dual:
    """The maximum of the counts; where they are not counted, whichever entry might win."""
    if setting.counting:
        return linear_map(setting, x, lambda t: t.amax(_dims(t, dim), keepdim))
    return linear_map(setting, x, lambda t: t.sum(_dims(t, dim), keepdim))


_Extreme = namedtuple("_Extreme", "values indices")


@rule("max", "min")
def _max(setting: Setting, x: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    if isinstance(dim, Tensor) or other is not None:
        return total(setting, x, dim if other is None else other)
    values = _extremum(setting, x, dim, keepdim)
    return values if dim is None else _Extreme(values, None)


@rule("cumsum")
def _cumsum(setting: Setting, x: Dual, dim: int, **kwargs: Any) -> Dual:
    return linear_map(setting, x, lambda t: t.cumsum(dim))


@rule("masked_fill")
def _masked_fill(setting: Setting, x: Dual, mask: Tensor, value: Any) -> Dual:
    """-inf blocks an attention pair; any other number is a constant."""
    if value == -math.inf:
        result = x.copy()
        result.blocked = mask.expand(x.shape)
        return result
    filled = torch.where(mask, float(value != 0), x.value.detach())
    return Dual.make(filled, None if x.paths is None else torch.where(mask, 0.0, x.paths))


@rule("where")
def _where(setting: Setting, condition: Tensor, input: Any, other: Any) -> Dual:
    x, y = dual(setting, input), dual(setting, other)
    live = x.paths is not None or y.paths is not None
    paths = torch.where(condition, paths_of(x), paths_of(y)) if live else None
    return finished(setting, torch.where(condition, x.value, y.value), paths)


@rule("zeros_like", "empty_like", "new_zeros", "new_empty")
def _zeros(setting: Setting, x: Dual, *size: Any, **kwargs: Any) -> Any:
    return _filled(setting, x, size, 0.0, kwargs)


@rule("ones_like", "new_ones", "rand_like", "randn_like")
def _ones(setting: Setting, x: Dual, *size: Any, **kwargs: Any) -> Any:
    return _filled(setting, x, size, 1.0, kwargs)


def _filled(setting: Setting, x: Dual, size: tuple[Any, ...], value: float, kwargs: dict[str, Any]) -> Any:
    shape: Sequence[int] = size or kwargs.get("size", x.value.shape)
    if not isinstance(shape[0], int):
        shape = shape[0]
    dtype = kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return torch.full(tuple(shape), value, dtype=dtype)
    result = constant(setting, shape, value)
    result.plain = result.value.clone()
    return result
