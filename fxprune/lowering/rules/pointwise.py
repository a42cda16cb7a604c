"""Elementwise arithmetic: activations, sums, products, scales."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant, unknown_numbers
from fxprune.lowering.rules.table import Context, RuleTable, Unknown, substitute, tensors_in
from fxprune.torch_private import nn_functions

__all__ = ["MOVES_TYPE", "has_floor", "table"]

table = RuleTable()

_NAMES = """
    relu relu6 gelu silu mish hardswish hardtanh leaky_relu elu selu celu prelu rrelu threshold tanh sigmoid
    hardsigmoid logsigmoid softplus softsign tanhshrink hardshrink softshrink
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    abs absolute neg negative positive exp exp2 expm1 log log2 log10 log1p sqrt reciprocal sin cos tan
    sinh cosh asin acos atan erf erfc sign round floor ceil trunc frac clamp clip clamp_min clamp_max
    nan_to_num logit sigmoid_ relu_ relu6_ tanh_ exp_ sqrt_ neg_ abs_ clamp_ clamp_min_ clamp_max_ clip_
    leaky_relu_ hardtanh_ elu_ gelu_ silu_ hardswish_ hardsigmoid_ round_ floor_ dropout_ reciprocal_
    as_tensor contiguous clone detach to float double half bfloat16 type type_as cpu cuda requires_grad_
    conj real imag alias
    eq ne lt le gt ge greater greater_equal less less_equal not_equal
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
    logical_not isnan isfinite isinf bool int long byte char short
""".split()
_MODULES = [
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU,
    nn.CELU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid,
    nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
]  # fmt: skip


def _spellings() -> set[Any]:
    found: set[Any] = set(_NAMES)
    for name in _NAMES:
        for room in (torch, F, torch.special, nn_functions):
            if callable(getattr(room, name, None)):
                found.add(getattr(room, name))
    # Python's own comparisons and signs, as fx records them on proxies.
    found.update((operator.neg, operator.pos, operator.abs, operator.eq, operator.ne, operator.invert))
    found.update((operator.lt, operator.le, operator.gt, operator.ge, torch.logical_not))
    return found


OF_BOOLEANS = (operator.invert, operator.and_, operator.or_, operator.xor, "bitwise_not", torch.bitwise_not)


def has_floor(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether f(0) != 0, found by evaluating f there: sigmoid(0) = 0.5, softmax(0) = 1, gelu(0) = 0."""
    if context.module is not None and isinstance(context.module, nn.Module):
        function: Any = context.module
        if next(function.parameters(), None) is not None:  # PReLU: f(0) = 0, and its slope may be on meta
            return False
    else:
        function = context.target

    kind = torch.bool if context.target in OF_BOOLEANS else torch.float32

    def zero(x: ir.Value | Constant) -> Tensor:
        return torch.zeros((1,) * max(1, len(x.shape)), dtype=kind)

    args, kwargs = substitute(args, zero), substitute(kwargs, zero)
    try:
        if isinstance(function, str):
            result = getattr(args[0], function)(*args[1:], **kwargs)
        else:
            result = function(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise Unknown(f"cannot evaluate {function} at zero: {error}") from error
    return bool((result != 0).any()) if isinstance(result, Tensor) else False


MOVES_TYPE = {
    "as_tensor", "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type",
    "type_as", "cpu", "cuda", "requires_grad_", "alias", torch.clone, torch.detach,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
    F.feature_alpha_dropout, torch.dropout, "conj", "real", "imag", torch.conj, torch.real, torch.imag,
    "detach_", "round", torch.round,
}  # fmt: skip


_PRELU = (F.prelu, torch.prelu, "prelu")


def _with_rank(context: Context, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """A value that is broadcast to more axes."""
    if len(shape) < len(value.shape):
        raise Unknown(f"{context.node.name} changes the rank of its input")
    if len(shape) == len(value.shape):
        return value
    own = (*[1] * (len(shape) - len(value.shape)), *value.shape)
    return context.build.gather(TensorFunction.of("reshape", PREVIOUS, own), [value], own)


@table.rule(*_spellings(), *_MODULES)
def elementwise(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y = f(x)``: paths pass; if f(0) != 0 the value is never Zero."""
    shape = context.shape
    value = _with_rank(context, context.build.materialise(x), shape)
    if context.target in MOVES_TYPE:
        return context.build.affine(value, shape)
    if any(isinstance(a, ir.Value) for a in tensors_in((args, kwargs))):
        others = [a for a in tensors_in((args, kwargs)) if isinstance(a, ir.Value)]
        return context.build.sum([value, *(_with_rank(context, other, shape) for other in others)], shape)
    constants = [a for a in tensors_in((args, kwargs)) if isinstance(a, Constant) and a.reads is not None]
    slopes = list(context.module.parameters()) if context.module is not None else []
    floor = has_floor(context, (x, *args), kwargs)
    if not constants and not slopes:
        return context.build.map(context.build.affine(value, shape), floor=floor)
    result = context.build.map_anew(context.build.affine(value, shape), floor=floor)
    for slope in (*constants, *slopes):
        is_prelu = isinstance(slope, Tensor) or context.target in _PRELU
        context.build.read(result, slope, [(result.index, 1)] if is_prelu and len(shape) > 1 else None)
    return result


_ADD = (
    operator.add,
    operator.iadd,
    torch.add,
    "add",
    "add_",
    "__add__",
    "__radd__",
)
_SUB = (
    operator.sub,
    operator.isub,
    torch.sub,
    torch.subtract,
    "sub",
    "sub_",
    "subtract",
    torch.rsub,
    "rsub",
)
_MORE = (
    torch.maximum,
    torch.minimum,
    "maximum",
    "minimum",
    torch.fmax,
    torch.fmin,
    torch.logaddexp,
    torch.atan2,
    torch.hypot,
)
_LOGIC = (
    operator.and_,
    operator.or_,
    operator.xor,
    torch.logical_and,
    torch.logical_or,
    "logical_and",
    "logical_or",
)


@table.rule(*_ADD, *_SUB, *_MORE, *_LOGIC)
def add(context: Context, a: Any, b: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y = a + b``: paths add (signs never cancel); a constant is a bias. ``x - mean(x)`` is the centring of
    a norm.
    """
    build, shape = context.build, context.shape
    if isinstance(a, ir.Value) and isinstance(b, ir.Value):
        is_difference = context.target in _SUB and not args and kwargs.get("alpha", 1) == 1
        for whole, mean in ((a, b), (b, a)) if is_difference else ():
            of, axes = build.mean_of.get(mean.index, (None, ()))
            if of == whole.index and whole.shape == shape:
                return build.norm(whole, axes, shape)
        return build.sum([a, b], shape)
    value, constant = (a, b) if isinstance(a, ir.Value) else (b, a)
    return plus_constant(context, value, constant)


def plus_constant(context: Context, value: ir.Value, constant: Any) -> ir.Value:
    """A bias, by its existence; entries of minus infinity block attention pairs."""
    build, shape = context.build, context.shape
    if not isinstance(constant, Constant):
        return build.affine(value, shape, bias=constant != 0)
    numbers = None if constant.is_learnt else constant.numbers()
    present = not constant.zero if numbers is None else bool((numbers != 0).any())
    if constant.statistic is not None and not present:
        return _normed(context, value, constant)
    result = build.affine(value, shape, bias=present, by=constant)
    if numbers is not None and bool(torch.isneginf(numbers.float()).any()):
        build.blocked[result.index] = torch.isneginf(numbers.float()).expand(shape)
    return result


_MUL = (
    operator.mul,
    operator.imul,
    torch.mul,
    torch.multiply,
    "mul",
    "mul_",
    "multiply",
    "__mul__",
    "__rmul__",
)


@table.rule(*_MUL)
def multiply(context: Context, a: Any, b: Any, **kwargs: Any) -> ir.Value | Constant:
    """``y = a * b``: a gate if both depend on the input, else a scale."""
    build, shape = context.build, context.shape
    if isinstance(a, ir.Value) and isinstance(b, ir.Value):
        if a is b:
            return squared(context, a)
        return build.gate(a, b, shape)
    value, other = (a, b) if isinstance(a, ir.Value) else (b, a)
    return scale(context, value, other)


def scale(context: Context, value: ir.Value, other: Any) -> ir.Value | Constant:
    """A factor counts by its existence; zero throughout it leaves nothing."""
    shape = context.shape
    numbers = other.numbers() if isinstance(other, Constant) and not other.is_learnt else None
    nothing = (
        bool((numbers == 0).all()) if numbers is not None else isinstance(other, Constant) and other.zero
    )
    if nothing or (not isinstance(other, Constant) and other == 0):
        return Constant(shape, torch.float32, lambda: torch.zeros(shape), zero=True)
    if isinstance(other, Constant) and other.statistic is not None:
        return _normed(context, value, other)
    return context.build.affine(value, shape, by=other if isinstance(other, Constant) else None)


def _normed(context: Context, value: ir.Value, statistic: Constant) -> ir.Value:
    """A norm written by hand: one number of the statistic serves all entries along an axis."""
    axes = statistic_axes([statistic], context.shape) or ()
    within = [axis for axis in axes if -axis <= len(value.shape)]
    result = context.build.norm(value, within, context.shape)
    context.build.read(result, statistic)
    return result


def statistic_axes(operands: Iterable[ir.Value | Constant], shape: Sequence[int]) -> frozenset[int] | None:
    """Return the axes (from -1 down) that statistics among ``operands`` were taken along:
    those with one number for several entries of ``shape``. ``None`` if there is no statistic."""
    found = [x for x in operands if isinstance(x, Constant) and x.statistic is not None]
    if not found:
        return None
    axes: set[int] = set()
    for x in found:
        axes.update(x.statistic or ())
        for axis, size in enumerate(reversed(shape), start=1):
            if size > 1 and (axis > len(x.shape) or x.shape[-axis] == 1):
                axes.add(-axis)
    return frozenset(axes)


_DIV = (
    operator.truediv,
    operator.itruediv,
    torch.div,
    torch.divide,
    torch.true_divide,
    "div",
    "div_",
    "true_divide",
)


@table.rule(*_DIV, "divide", operator.floordiv, operator.mod, torch.remainder, "remainder", torch.fmod)
def divide(context: Context, a: Any, b: Any, **kwargs: Any) -> ir.Value | Constant:
    """``y = a / b``: a gate whose divisor is never Zero."""
    build, shape = context.build, context.shape
    if isinstance(b, Constant) and b.statistic is not None:
        return _normed(context, a, b)
    if not isinstance(b, ir.Value):
        return build.affine(a, shape, by=b if isinstance(b, Constant) else None)
    divisor = build.map(b, floor=True)
    return build.gate(a, divisor, shape) if isinstance(a, ir.Value) else scale(context, divisor, a)


@table.rule(torch.square, "square", "square_")
def square(context: Context, x: ir.Value) -> ir.Value:
    return squared(context, x)


def squared(context: Context, x: ir.Value) -> ir.Value:
    """A square; its mean is a second moment, which norms divide by."""
    result = context.build.map_anew(x)
    context.build.squares.add(result.index)
    return result


@table.rule(torch.rsqrt, "rsqrt", "rsqrt_")
def rsqrt(context: Context, x: Any) -> Constant:
    """One over a root is the statistic of a norm: a scale, no path."""
    return statistic(context.shape)


def present(shape: tuple[int, ...]) -> Constant:
    """A constant that is nowhere Zero."""
    return Constant(shape, torch.float32, unknown_numbers)


def statistic(shape: tuple[int, ...]) -> Constant:
    """A variance or a length of the input: a norm divides by it, so that it counts as a constant."""
    return Constant(shape, torch.float32, unknown_numbers, statistic=frozenset())


@table.rule(operator.pow, operator.ipow, torch.pow, "pow", "pow_", "__pow__", "__rpow__", torch.float_power)
def power(context: Context, a: Any, b: Any) -> ir.Value | Constant:
    """``y = a ^ b``: a map of whichever depends on the input; c^0 = 1 gives an exponent a floor."""
    build, shape = context.build, context.shape
    if isinstance(a, ir.Value) and isinstance(b, ir.Value):
        return build.sum([a, b], shape)
    if isinstance(b, ir.Value):
        return build.map(build.affine(b, shape), floor=True)
    if b == -0.5:
        return statistic(shape)
    if b == 0:
        return present(shape)
    if isinstance(b, (int, float)) and b == 2:
        return squared(context, a)
    return build.map(build.affine(a, shape), floor=isinstance(b, (int, float)) and b < 0)


@table.rule(torch.lerp, "lerp", "lerp_")
def lerp(context: Context, a: Any, b: Any, weight: Any) -> ir.Value:
    """``y = a + weight * (b - a)``."""
    build, shape = context.build, context.shape
    terms = []
    for side, floor in ((a, True), (b, False)):
        value = build.materialise(side)
        if isinstance(weight, ir.Value):
            value = build.gate(value, build.map(weight, floor=True) if floor else weight, shape)
        terms.append(value)
    return build.sum(terms, shape)


@table.rule(torch.addcmul, "addcmul", "addcmul_")
def addcmul(context: Context, x: Any, a: Any, b: Any, *, value: float = 1) -> ir.Value:
    """``y = x + a * b``."""
    build, shape = context.build, context.shape
    product = build.gate(build.materialise(a), build.materialise(b), shape)
    return build.sum([build.materialise(x), product], shape)


@table.rule(F.glu, nn.GLU, nn_functions.glu)
def glu(context: Context, x: ir.Value, dim: int = -1) -> ir.Value:
    """``y = a * sigmoid(b)``, a and b the halves of x."""
    dim = getattr(context.module, "dim", dim)
    build, shape = context.build, context.shape
    cut = TensorFunction.of("chunk", PREVIOUS, 2, dim)
    halves = [build.gather(cut.then(operator.getitem, PREVIOUS, i), [x], shape) for i in range(2)]
    return build.gate(halves[0], build.map(halves[1], floor=True), shape)


@table.rule(torch.softmax, F.softmax, "softmax", torch.log_softmax, F.log_softmax, "log_softmax", F.softmin)
@table.rule(nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
def softmax(context: Context, input: Any, dim: Any = None, *args: Any, **kwargs: Any) -> ir.Value:
    """Elementwise on paths, never Zero but where a mask has blocked the pair."""
    build = context.build
    value = build.materialise(input)
    blocked = build.blocked.get(value.index)
    if isinstance(context.module, nn.Softmax2d):
        dim = -3
    elif context.module is not None:
        dim = getattr(context.module, "dim", None)
    if dim is None:  # torch's choice where the caller makes none
        dim = 0 if len(value.shape) in (0, 1, 3) else 1
    result = build.map(value, floor=True, axes=(dim,))
    return result if blocked is None else build.select(result, ~blocked, value.shape)


@table.rule(F.gumbel_softmax)
def gumbel_softmax(
    context: Context, logits: Any, tau: Any = 1, hard: Any = False, eps: Any = 1e-10, dim: int = -1
) -> ir.Value:
    """A softmax of noisy numbers; entries that are Zero are seldom chosen."""
    return context.build.map(context.build.materialise(logits), axes=(dim,))
