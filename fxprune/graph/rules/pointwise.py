"""Elementwise arithmetic: activations, sums, products, scales."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.builder import Constant
from fxprune.graph.rules.table import Context, RuleTable, Unknown, substitute, tensors_in

__all__ = ["table"]

table = RuleTable()

_NAMES = """
    relu relu6 gelu silu mish hardswish hardtanh leaky_relu elu selu celu prelu rrelu threshold tanh sigmoid hardsigmoid
    logsigmoid softplus softsign tanhshrink hardshrink softshrink softmax log_softmax softmin gumbel_softmax
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    abs absolute neg negative positive exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan
    sinh cosh asin acos atan erf erfc sign round floor ceil trunc frac clamp clip clamp_min clamp_max nan_to_num
    logit sigmoid_ relu_ relu6_ tanh_ exp_ sqrt_ neg_ abs_ clamp_ clamp_min_ clamp_max_ clip_ leaky_relu_ hardtanh_
    elu_ square_ softmax_ gelu_ silu_ hardswish_ hardsigmoid_ round_ floor_ dropout_ reciprocal_ rsqrt_
    masked_fill masked_fill_ contiguous clone detach to float double half bfloat16 type type_as cpu cuda requires_grad_
    conj real imag view_as_real view_as_complex alias softmax log_softmax
    eq ne lt le gt ge logical_not isnan isfinite isinf bool int long
""".split()
_MODULES = [
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU,
    nn.PReLU, nn.RReLU, nn.Threshold, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign,
    nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
]  # fmt: skip


def _spellings() -> set[Any]:
    found: set[Any] = set(_NAMES)
    for name in _NAMES:
        for room in (torch, F, torch.special, torch._C._nn):
            if callable(getattr(room, name, None)):
                found.add(getattr(room, name))
    # Python's own comparisons and signs, as fx records them on proxies.
    found.update((operator.neg, operator.pos, operator.abs, operator.eq, operator.ne, operator.invert))
    found.update((operator.lt, operator.le, operator.gt, operator.ge, torch.logical_not))
    return found


def _has_floor(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether f(0) != 0, found by evaluating f there: sigmoid(0) = 0.5, softmax(0) = 1, gelu(0) = 0."""
    if context.module is not None and isinstance(context.module, nn.Module):
        function: Any = context.module
        if next(function.parameters(), None) is not None:  # PReLU: f(0) = 0, and its slope may be on meta
            return False
    else:
        function = context.target

    def zero(x: ir.Value | Constant) -> Tensor:
        return torch.zeros((1,) * max(1, len(x.shape)))

    args, kwargs = substitute(args, zero), substitute(kwargs, zero)
    try:
        if isinstance(function, str):
            result = getattr(args[0], function)(*args[1:], **kwargs)
        else:
            result = function(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise Unknown(f"cannot evaluate {function} at zero: {error}") from error
    return bool((result != 0).any()) if isinstance(result, Tensor) else False


_MOVES_TYPE = {
    "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda",
    "requires_grad_", "alias", "masked_fill", "masked_fill_", torch.masked_fill, torch.clone, torch.detach,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    "conj", "real", "imag", torch.conj, torch.real, torch.imag, F.gumbel_softmax, "detach_", "round", torch.round,
}  # fmt: skip


@table.rule(*_spellings(), *_MODULES)
def elementwise(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y = f(x)``: paths pass; if f(0) != 0 the value is never Zero."""
    value = context.build.materialise(x)
    shape = context.shape
    if len(shape) != len(value.shape):
        raise Unknown(f"{context.node.name} changes the rank of its input")
    if context.target in _MOVES_TYPE:
        return context.build.affine(value, shape)
    if any(isinstance(a, ir.Value) for a in tensors_in((args, kwargs))):
        others = [a for a in tensors_in((args, kwargs)) if isinstance(a, ir.Value)]
        return context.build.sum([value, *others], shape)
    if not value.live and value.shape == shape:
        return value
    return context.build.map(context.build.affine(value, shape), floor=_has_floor(context, (x, *args), kwargs))


_ADD = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__radd__", operator.sub, operator.isub)
_SUB = (torch.sub, torch.subtract, "sub", "sub_", "subtract", torch.rsub, "rsub", torch.maximum, torch.minimum)
_MORE = ("maximum", "minimum", torch.fmax, torch.fmin, torch.lerp, "lerp", torch.logaddexp, torch.atan2, torch.hypot)
_LOGIC = (operator.and_, operator.or_, operator.xor, torch.logical_and, torch.logical_or, "logical_and", "logical_or")


@table.rule(*_ADD, *_SUB, *_MORE, *_LOGIC)
def add(context: Context, a: Any, b: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y = a + b``: paths add; a constant is a bias."""
    values = [x for x in (a, b, *tensors_in((args, kwargs))) if isinstance(x, ir.Value)]
    constant = [x for x in (a, b) if not isinstance(x, ir.Value)]
    present = any(not (x.zero if isinstance(x, Constant) else x == 0) for x in constant)
    if len(values) == 1:
        return context.build.affine(values[0], context.shape, bias=present)
    total = context.build.sum(values, context.shape)
    return context.build.affine(total, bias=True) if present and constant else total


_MUL = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "__mul__", "__rmul__")


@table.rule(*_MUL, torch.float_power)
def multiply(context: Context, a: Any, b: Any, **kwargs: Any) -> ir.Value | Constant:
    """``y = a * b``: a gate if both depend on the input, else a scale."""
    if isinstance(a, ir.Value) and isinstance(b, ir.Value):
        if a is b:
            return a
        return context.build.gate(a, b, context.shape)
    value, other = (a, b) if isinstance(a, ir.Value) else (b, a)
    if isinstance(other, Constant) and other.zero:
        shape = context.shape
        return Constant(shape, torch.float32, lambda: torch.zeros(shape), zero=True)
    return context.build.affine(value, context.shape)


_DIV = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "true_divide")


@table.rule(*_DIV, "divide", operator.floordiv, operator.mod, torch.remainder, "remainder", torch.fmod)
def divide(context: Context, a: Any, b: Any, **kwargs: Any) -> ir.Value:
    """``y = a / b``: a gate whose divisor is never Zero."""
    build, shape = context.build, context.shape
    if not isinstance(b, ir.Value):
        return build.affine(a, shape)
    divisor = build.map(b, floor=True)
    if isinstance(a, ir.Value):
        return build.gate(a, divisor, shape)
    return build.affine(divisor, shape)


@table.rule(operator.pow, operator.ipow, torch.pow, "pow", "pow_", "__pow__", "__rpow__")
def power(context: Context, a: Any, b: Any) -> ir.Value:
    """``y = a ^ b``: a map of whichever depends on the input; c^0 = 1 gives an exponent a floor."""
    build, shape = context.build, context.shape
    if isinstance(a, ir.Value) and isinstance(b, ir.Value):
        return build.sum([a, b], shape)
    if isinstance(a, ir.Value):
        floor = isinstance(b, (int, float)) and b <= 0
        return build.map(build.affine(a, shape), floor=floor)
    return build.map(build.affine(b, shape), floor=True)


@table.rule(torch.addcmul, "addcmul", "addcmul_")
def addcmul(context: Context, x: Any, a: Any, b: Any, *, value: float = 1) -> ir.Value:
    """``y = x + a * b``."""
    inner = Context(context.build, context.node, torch.mul, context.result)
    product = multiply(inner, a, b)
    return add(inner, x, product)


@table.rule(F.glu, nn.GLU, torch.glu if hasattr(torch, "glu") else "glu")
def glu(context: Context, x: ir.Value, dim: int = -1) -> ir.Value:
    """``y = a * sigmoid(b)``, a and b the halves of x."""
    dim = getattr(context.module, "dim", dim)
    build, shape = context.build, context.shape
    halves = [
        build.gather(lambda tensors, i=i: tensors[0].chunk(2, dim)[i], [x], shape)  # type: ignore[misc]
        for i in range(2)
    ]
    return build.gate(halves[0], build.map(halves[1], floor=True), shape)


@table.rule(F.normalize)
def normalize(context: Context, x: ir.Value, *args: Any, **kwargs: Any) -> ir.Value:
    """A norm by statistics alone: identity."""
    return context.build.affine(x, context.shape)


@table.rule("normal_", "uniform_", "bernoulli_", "random_", torch.bernoulli, "bernoulli")
def noise(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """Noise replaces what was there: a constant."""
    shape = context.shape
    return Constant(shape, torch.float32, lambda: torch.full(shape, math.nan))
