"""Duals and what every torch operation does to them: the semantics of "effective path", one rule per operation.

A rule that is missing raises `UnknownOpError`; nothing passes in silence.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map


class UnknownOpError(TypeError):
    """The model used an operation that has no rule."""


@dataclass
class Setting:
    """How one run reads the model: counted or 0/1, zero-padded or periodic."""

    counting: bool
    circular: bool
    start: float = 1.0
    integers: set[int] = field(default_factory=set)

    def is_lookup(self, func: Any, args: Sequence[Any]) -> bool:
        """An embedding of an integer input starts paths."""
        return func is F.embedding and id(args[0]) in self.integers


class Round(torch.autograd.Function):
    """Non-negative to 0/1, forward and backward: patterns stay exact at any depth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


class Dual(Tensor):
    """A tensor of the model: `value` is 1 where it is not Zero, `paths` the paths from the inputs that end here.

    `paths` is None for a constant. The `value` of a prunable weight, or of what is derived from one, carries
    the gradient; the `value` of an activation never does.
    """

    value: Tensor
    paths: Tensor | None
    square: bool  # a square: its mean is a second moment, hence a statistic
    mean_of: Any  # the dual this is the mean of: x - mean(x) is centring, hence x
    blocked: Tensor | None  # attention scores: pairs set to -inf
    base: Any  # the dual this is a view of, and the version of it that was seen
    seen: int
    version: int
    stale: Any  # the view through which this was changed, until it is written back

    @staticmethod
    def make(value: Tensor, paths: Tensor | None = None) -> Dual:
        dual = Tensor._make_wrapper_subclass(Dual, value.shape, dtype=torch.float64)
        dual.value, dual.paths = value, paths
        dual.square, dual.mean_of, dual.blocked, dual.base, dual.stale = False, None, None, None, None
        dual.version = dual.seen = 0
        return dual

    def copy(self) -> Dual:
        dual = Dual.make(self.value, self.paths)
        dual.square, dual.blocked = self.square, self.blocked
        return dual

    def become(self, other: Dual) -> Dual:
        """In-place change. What shares this memory is marked, so that a later read of it cannot be wrong."""
        if self.value.shape != other.value.shape:
            raise UnknownOpError("an in-place operation changed a shape")
        if self.base is not None:
            self.base.stale = self
        self.value, self.paths, self.square, self.mean_of = other.value, other.paths, other.square, None
        self.blocked = other.blocked
        self.version += 1
        return self

    def check(self) -> Dual:
        if self.stale is not None or (self.base is not None and self.base.version != self.seen):
            raise UnknownOpError("a tensor is read after it was changed in place through a view")
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnknownOpError(f"{func} reached a dual below the rules")

    def __repr__(self) -> str:
        return f"Dual{tuple(self.value.shape)}"


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}  # rule(setting, *args, **kwargs), with the signature of the torch function
FAMILIES: dict[str, Callable[[Setting, Any, tuple[Any, ...], dict[str, Any]], Any]] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


# ---------------------------------------------------------------- the one entrance

_PLAIN = set(
    "shape dtype device ndim is_cuda is_mps is_meta layout requires_grad is_leaf grad grad_fn is_sparse is_quantized "
    "is_nested is_mkldnn names itemsize nbytes is_cpu is_xpu is_xla "
    "size dim numel nelement ndimension is_contiguous stride element_size is_floating_point is_complex get_device "
    "storage_offset data_ptr __len__ __hash__ __repr__ __format__ is_tensor is_inference is_signed "
    "_is_view is_conj is_neg _typed_storage output_nr _version".split()
)
_REVERSED = {"__rsub__": "rsub", "__rdiv__": "rdiv", "__rtruediv__": "rdiv", "__rpow__": "rpow", "__rmatmul__": "rmatmul",
             "__radd__": "add", "__rmul__": "mul"}  # fmt: skip
_IN_PLACE = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__idiv__": "div",
    "__itruediv__": "div",
}
_DUNDER = {"__truediv__": "div", "__matmul__": "matmul", "__add__": "add", "__sub__": "sub", "__mul__": "mul",
           "__neg__": "neg", "__pow__": "pow", "__abs__": "abs", "__div__": "div"}  # fmt: skip


def spelling(func: Any) -> tuple[str, bool]:
    """The name of a torch function, and whether it works in place."""
    name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    if name in _IN_PLACE:
        return _IN_PLACE[name], True
    name = _REVERSED.get(name, _DUNDER.get(name, name))
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1], True
    return name, False


def perform(setting: Setting, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One torch function on duals."""
    name, in_place = spelling(func)
    if name in _PLAIN:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name == "__setitem__":
        return _setitem(*args)
    for leaf in tree_leaves((args, kwargs)):
        if type(leaf) is Dual:
            leaf.check()
    inplace = kwargs.get("inplace") is True
    kwargs = {key: value for key, value in kwargs.items() if key not in ("inplace", "out")}
    if name in RULES:
        result = RULES[name](setting, *args, **kwargs)
    elif name in FAMILIES:
        result = FAMILIES[name](setting, func, args, kwargs)
    else:
        where = getattr(func, "__module__", None) or getattr(func, "__objclass__", type(None)).__name__
        raise UnknownOpError(f"no rule for {name!r} ({where})")
    if in_place or inplace:
        if type(args[0]) is not Dual:
            raise UnknownOpError(f"{name!r} writes a dual into a plain tensor")
        return args[0].become(result)
    return result


def _setitem(target: Any, index: Any, source: Any) -> None:
    if type(target) is not Dual:
        raise UnknownOpError("'__setitem__' writes a dual into a plain tensor")
    if target.stale is source and source is not None:
        target.stale = None  # x[i] += y: the view that was changed is being written back
    source = dual(source)
    value, paths = target.value.clone(), target.paths
    value[index] = source.value.detach()
    if paths is not None or source.paths is not None:
        paths = torch.zeros_like(value) if paths is None else paths.clone()
        paths[index] = torch.zeros_like(source.value) if source.paths is None else source.paths
    target.check().become(Dual.make(value, paths))


# ---------------------------------------------------------------- the algebra


def dual(x: Any) -> Dual:
    """A number or a plain tensor is a constant: non-zero where it is non-zero."""
    if type(x) is Dual:
        return x
    value = x if isinstance(x, Tensor) else torch.tensor(float(x))
    return Dual.make((value != 0).to("cpu", torch.float64))


def settle(setting: Setting, value: Tensor, paths: Tensor | None) -> Dual:
    """Round the value, and the paths unless they are counted; only a weight's value keeps its gradient."""
    if paths is not None or not value.requires_grad:
        value = (value.detach() > 0).to(torch.float64)
    elif not setting.counting:
        value = Round.apply(value)
    if paths is not None and not setting.counting:
        paths = Round.apply(paths)
    return Dual.make(value, paths)


def paths_of(x: Dual) -> Tensor:
    return torch.zeros_like(x.value) if x.paths is None else x.paths


def linear_map(setting: Setting, x: Any, function: Callable[[Tensor], Tensor]) -> Dual:
    """A map with non-negative coefficients."""
    x = dual(x)
    return settle(setting, function(x.value), None if x.paths is None else function(x.paths))


def total(setting: Setting, *terms: Any) -> Dual:
    """A sum (or a difference: signs never cancel)."""
    duals = [dual(term) for term in terms]
    value = sum((term.value for term in duals[1:]), duals[0].value)
    live = [term.paths for term in duals if term.paths is not None]
    paths = sum(live, torch.zeros_like(value)) if live else None
    return settle(setting, value, paths)


def product(setting: Setting, function: Callable[..., Tensor], *factors: Any) -> Dual:
    """A multilinear map: paths through each factor, where the others are not Zero."""
    duals = [dual(factor) for factor in factors]
    values = [factor.value for factor in duals]
    weights = all(value.requires_grad for value in values)
    paths: Tensor | None = None
    for place, factor in enumerate(duals):
        if factor.paths is not None:
            term = function(*values[:place], factor.paths, *values[place + 1 :])
            paths = term if paths is None else paths + term
    value = function(*(values if weights else [value.detach() for value in values]))
    return settle(setting, value, paths)


def scaled(setting: Setting, x: Any, y: Any) -> Dual:
    """Elementwise product. A weight keeps its gradient under a scale."""
    x, y = dual(x), dual(y)
    if x.paths is None and y.paths is None:
        return settle(setting, x.value * y.value, None)
    return product(setting, torch.mul, x, y)


def constant(shape: Sequence[int], value: float = 1.0) -> Dual:
    return Dual.make(torch.full(tuple(shape), value, dtype=torch.float64))


def never_zero(x: Dual) -> Dual:
    return Dual.make(torch.ones_like(x.value), x.paths)


# ---------------------------------------------------------------- moving data


def move(setting: Setting, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An index map: the same function on the values and on the paths."""
    leaves = tree_leaves((args, kwargs))
    duals = [leaf for leaf in leaves if type(leaf) is Dual]
    live = any(leaf.paths is not None for leaf in duals)
    many = sum(isinstance(leaf, Tensor) for leaf in leaves) > 1 and spelling(func)[0] in _JOINS

    def on(part: Callable[[Dual], Tensor]) -> Any:
        def pick(leaf: Any) -> Any:
            if type(leaf) is Dual:
                return part(leaf)
            if many and isinstance(leaf, Tensor) and leaf.is_floating_point():
                return part(dual(leaf))
            return leaf

        a, k = tree_map(pick, (args, kwargs))
        return func(*a, **k)

    values = on(lambda leaf: leaf.value.detach() if live else leaf.value)
    paths = on(paths_of) if live else None
    first = args[0] if type(args[0]) is Dual else None

    def wrap(value: Tensor, path: Tensor | None) -> Dual:
        result = Dual.make(value, path)
        if first is not None:
            result.square = first.square
            if value.untyped_storage().data_ptr() == first.value.untyped_storage().data_ptr():
                result.base, result.seen = first, first.version
        return result

    if isinstance(values, Tensor):
        return wrap(values, paths)
    pairs = zip(values, paths if live else [None] * len(values), strict=True)
    return type(values)(wrap(value, path) for value, path in pairs)


_JOINS = set("cat concat concatenate stack hstack vstack dstack column_stack row_stack".split())
for _name in _JOINS | set(
    "reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze unsqueeze expand "
    "expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile chunk split split_with_sizes unsafe_split "
    "unsafe_chunk tensor_split unbind narrow select index_select gather take_along_dim __getitem__ roll flip fliplr "
    "flipud rot90 pixel_shuffle pixel_unshuffle channel_shuffle view_as reshape_as T mT H mH t adjoint diagonal ravel "
    "tril triu hsplit vsplit dsplit atleast_2d atleast_3d atleast_1d diag_embed masked_select index_copy".split()
):
    FAMILIES[_name] = move


@rule("view")
def _view(setting: Setting, x: Dual, *shape: Any) -> Dual:
    """The patterns need not be contiguous where the tensor of the model is."""
    return move(setting, Tensor.reshape, (x, *shape), {})


@rule("__iter__")
def _iterate(setting: Setting, x: Dual) -> Any:
    return iter(move(setting, torch.unbind, (x,), {}))


@rule("unfold")
def _unfold(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.unfold(dimension, size, step)` and `F.unfold(input, kernel_size, dilation, padding, stride)`."""
    if len(args) == 3 and all(isinstance(arg, int) for arg in args) and not kwargs:
        return move(setting, Tensor.unfold, (x, *args), {})
    if "dimension" in kwargs:
        return move(setting, Tensor.unfold, (x, *args), kwargs)
    return _im2col(setting, x, *args, **kwargs)


def _im2col(
    setting: Setting, x: Dual, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Dual:
    rows, columns = _tuple(padding, 2)

    def on(t: Tensor) -> Tensor:
        t = extend(extend(t, -2, rows, rows, setting.circular), -1, columns, columns, setting.circular)
        return F.unfold(t, kernel_size, dilation, 0, stride)

    return linear_map(setting, x, on)


@rule("fold")
def _fold(
    setting: Setting,
    x: Dual,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Dual:
    sizes, pads = _tuple(output_size, 2), _tuple(padding, 2)
    wide = tuple(size + 2 * pad for size, pad in zip(sizes, pads, strict=True))

    def on(t: Tensor) -> Tensor:
        t = F.fold(t, wide, kernel_size, dilation, 0, stride)
        return wrap_around(wrap_around(t, -2, pads[0], sizes[0], setting), -1, pads[1], sizes[1], setting)

    return linear_map(setting, x, on)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)


def extend(t: Tensor, dim: int, left: int, right: int, circular: bool) -> Tensor:
    """Pad one dimension with zeros, or periodically; negative amounts crop."""
    if left == right == 0:
        return t
    if circular:
        index = torch.arange(-left, t.shape[dim] + right) % t.shape[dim]
        return t.index_select(dim, index)
    pads = [0, 0] * t.dim()
    place = 2 * (-1 - dim if dim < 0 else t.dim() - 1 - dim)
    pads[place : place + 2] = [left, right]
    return F.pad(t, pads)


def wrap_around(t: Tensor, dim: int, left: int, size: int, setting: Setting) -> Tensor:
    """Entries `left .. left + size` of one dimension; what is outside is dropped, or added on periodically."""
    if not setting.circular:
        right = left + size - t.shape[dim]
        return extend(t, dim, -left, right, False)
    index = (torch.arange(t.shape[dim]) - left) % size
    shape = list(t.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=t.dtype).index_add(dim, index, t)


@rule("pad")
def _pad(
    setting: Setting, x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Dual:
    if mode != "constant":
        return move(setting, F.pad, (x, list(pad)), {"mode": mode})
    circular = setting.circular and _is_spatial(x.dim(), pad) and min(pad) >= 0

    def on(t: Tensor) -> Tensor:
        for place in range(0, len(pad), 2):
            t = extend(t, -1 - place // 2, pad[place], pad[place + 1], circular)
        return t

    result = linear_map(setting, x, on)
    if value and not circular:
        inside = on(torch.ones_like(x.value))
        result.value = torch.where(inside > 0, result.value, 1.0)
    return result


def _is_spatial(dims: int, pad: Sequence[int]) -> bool:
    """Channels-first images padded in their last dimensions, or channels-last ones in all but the last."""
    padded = {dims - 1 - place // 2 for place in range(0, len(pad), 2) if pad[place] or pad[place + 1]}
    if dims >= 4 and dims - 1 not in padded and 1 in padded:
        return 2 in padded  # (batch, height, width, channel); the channel dimension alone is no image
    return 0 not in padded and 1 not in padded


# ---------------------------------------------------------------- one operand

_SAME = (
    "relu relu6 leaky_relu gelu silu mish hardswish elu selu celu tanh hardtanh softsign tanhshrink softshrink "
    "hardshrink rrelu prelu abs neg negative sqrt log1p sin erf asin sinh asinh atan expm1 dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_dropout feature_alpha_dropout contiguous clone detach to float double half bfloat16 "
    "type type_as cuda cpu data normalize positive nan_to_num conj real requires_grad_ sgn sign threshold "
    "local_response_norm alias requires_grad hardtanh_ sparse_dropout"
).split()


@rule(
    *[
        name
        for name in _SAME
        if name not in ("requires_grad", "requires_grad_", "hardtanh_", "sparse_dropout")
    ]
)
def _same(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """Zero stays Zero: activations that vanish at zero, casts, dropout in eval, normalisation by a statistic."""
    result = dual(x).copy()
    result.base, result.seen = x.base, x.seen
    return result


@rule("sigmoid", "hardsigmoid", "log_softmax", "softmin", "logsigmoid", "softplus", "exp", "exp2", "cos",
      "cosh", "log_sigmoid")  # fmt: skip
def _never_zero(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """f(0) is not 0: 1 + x."""
    return never_zero(x)


@rule("softmax")
def _softmax(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """1 + x, elementwise; a pair that was set to -inf is Zero."""
    result = never_zero(x)
    if x.blocked is None:
        return result
    allowed = (~x.blocked).to(torch.float64)
    return Dual.make(result.value * allowed, None if x.paths is None else x.paths * allowed)


@rule("glu")
def _glu(setting: Setting, x: Dual, dim: int = -1) -> Dual:
    left, right = move(setting, torch.chunk, (x, 2, dim), {})
    return scaled(setting, left, never_zero(right))


@rule("clamp", "clip")
def _clamp(setting: Setting, x: Dual, min: Any = None, max: Any = None) -> Dual:
    """Zero stays Zero unless the range excludes it."""
    numbers = [bound for bound in (min, max) if bound is not None and not isinstance(bound, Tensor)]
    outside = (numbers and min is not None and min in numbers and min > 0) or (
        max is not None and max in numbers and max < 0
    )
    return never_zero(x) if outside else x.copy()


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
    if isinstance(x, Dual) and isinstance(exponent, int | float):
        if exponent in (-0.5, 0):
            return constant(x.shape)
        if exponent == -1:
            return never_zero(x)
        result = x.copy()
        result.square = exponent == 2
        return result
    raise UnknownOpError(f"no rule for a power {exponent!r}")


@rule("rsqrt")
def _statistic(setting: Setting, x: Dual) -> Dual:
    """One over a root is a norm's statistic: a scale, no path."""
    return constant(x.shape)


@rule("reciprocal")
def _reciprocal(setting: Setting, x: Dual) -> Dual:
    return never_zero(x)


def _reduced(x: Dual, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The shape after a reduction with the arguments of `torch.sum`."""
    kwargs = {key: value for key, value in kwargs.items() if key in ("dim", "keepdim")}
    return tuple(torch.sum(x.value.detach(), *args[:2], **kwargs).shape)


@rule("var", "std")
def _spread(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Dual:
    """A statistic: a scale, no path."""
    return constant(_reduced(x, args, kwargs))


@rule("var_mean", "std_mean")
def _moments(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> tuple[Dual, Dual]:
    """Both are statistics: the mean that a norm subtracts is no path and no bias."""
    shape = _reduced(x, args, kwargs)
    return constant(shape), constant(shape, 0.0)


@rule("norm", "linalg_vector_norm", "vector_norm")
def _norm(
    setting: Setting, x: Dual, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Dual:
    kwargs.pop("ord", None)
    return constant(_reduced(x, () if dim is None else (dim, keepdim), {}))


def _dims(x: Dual, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(x.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


@rule("sum", "nansum")
def _sum(setting: Setting, x: Dual, *dim: Any, keepdim: bool = False, **kwargs: Any) -> Dual:
    axes, keepdim = _axes(dim, keepdim, kwargs)
    return linear_map(setting, x, lambda t: t.sum(_dims(x, axes), keepdim))


def _axes(dim: tuple[Any, ...], keepdim: bool, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """`x.mean(1, 2)`, `x.mean((1, 2), True)`, `x.mean(dim=1)`, `x.mean(axis=1)`."""
    if dim and isinstance(dim[-1], bool):
        dim, keepdim = dim[:-1], dim[-1]
    if len(dim) == 1:
        return dim[0], keepdim
    return (dim or kwargs.get("dim", kwargs.get("axis"))), keepdim


@rule("mean")
def _mean(setting: Setting, x: Dual, *dim: Any, keepdim: bool = False, **kwargs: Any) -> Dual:
    result = _sum(setting, x, *dim, keepdim=keepdim, **kwargs)
    if x.square:
        return constant(result.shape)
    result.mean_of = x
    return result


@rule("amax", "amin", "logsumexp")
def _amax(setting: Setting, x: Dual, dim: Any = None, keepdim: bool = False) -> Dual:
    dims = _dims(x, dim)
    if setting.counting:
        return linear_map(setting, x, lambda t: t.amax(dims, keepdim))
    return linear_map(setting, x, lambda t: t.sum(dims, keepdim))


_Extreme = namedtuple("_Extreme", "values indices")


@rule("max", "min")
def _max(setting: Setting, x: Dual, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    if isinstance(dim, Tensor) or other is not None:
        return total(setting, x, dim if other is None else other)
    values = _amax(setting, x, dim, keepdim)
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
def _where(setting: Setting, condition: Tensor, x: Any, y: Any) -> Dual:
    x, y = dual(x), dual(y)
    live = x.paths is not None or y.paths is not None
    paths = torch.where(condition, paths_of(x), paths_of(y)) if live else None
    return settle(setting, torch.where(condition, x.value, y.value), paths)


@rule("zeros_like", "empty_like", "new_zeros", "new_empty")
def _zeros(setting: Setting, x: Dual, *size: Any, **kwargs: Any) -> Dual:
    return constant(_size(x, size, kwargs), 0.0)


@rule("ones_like", "new_ones")
def _ones(setting: Setting, x: Dual, *size: Any, **kwargs: Any) -> Dual:
    return constant(_size(x, size, kwargs))


def _size(x: Dual, size: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[int]:
    if size and not isinstance(size[0], int):
        return tuple(size[0])
    return size or kwargs.get("size", x.value.shape)


# ---------------------------------------------------------------- sums and products


@rule("add", "sub", "subtract", "rsub", "maximum", "minimum", "fmax", "fmin")
def _add(setting: Setting, x: Any, y: Any, *, alpha: float = 1) -> Dual:
    if type(y) is Dual and y.mean_of is not None and y.mean_of is x:
        return x.copy()  # centring is part of a norm
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
    return scaled(setting, x, never_zero(dual(y)))


@rule("rdiv")
def _rdiv(setting: Setting, x: Any, y: Any) -> Dual:
    return _div(setting, y, x)


@rule("lerp")
def _lerp(setting: Setting, x: Any, y: Any, weight: Any) -> Dual:
    return total(setting, x, scaled(setting, y, weight))


@rule("addcmul")
def _addcmul(setting: Setting, x: Any, y: Any, z: Any, *, value: float = 1) -> Dual:
    return total(setting, x, scaled(setting, y, z))


@rule("matmul", "mm", "bmm", "mv", "dot", "inner", "outer", "kron")
def _matmul(setting: Setting, x: Any, y: Any) -> Dual:
    return product(setting, torch.matmul, x, y)


@rule("rmatmul")
def _rmatmul(setting: Setting, x: Any, y: Any) -> Dual:
    return product(setting, torch.matmul, y, x)


@rule("baddbmm", "addmm", "addbmm", "addmv")
def _baddbmm(setting: Setting, x: Any, y: Any, z: Any, *, beta: float = 1, alpha: float = 1) -> Dual:
    multiplied = product(setting, torch.matmul, y, z)
    return total(setting, x, multiplied) if beta else multiplied


@rule("einsum")
def _einsum(setting: Setting, equation: str, *operands: Any) -> Dual:
    factors = operands[0] if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    return product(setting, lambda *parts: torch.einsum(equation, *parts), *factors)


@rule("tensordot")
def _tensordot(setting: Setting, x: Any, y: Any, dims: Any = 2) -> Dual:
    return product(setting, lambda a, b: torch.tensordot(a, b, dims), x, y)


@rule("linear")
def _linear(setting: Setting, input: Any, weight: Any, bias: Any = None) -> Dual:
    result = product(setting, F.linear, input, weight)
    return result if bias is None else total(setting, result, bias)


@rule("bilinear")
def _bilinear(setting: Setting, x: Any, y: Any, weight: Any, bias: Any = None) -> Dual:
    result = product(setting, F.bilinear, x, y, weight)
    return result if bias is None else total(setting, result, bias)


@rule("embedding")
def _embedding(setting: Setting, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Dual:
    """A constant, unless the integers are an input of the network: then the paths start here."""
    rows = dual(weight).value[input]
    return Dual.make(rows, rows.detach() * setting.start if id(input) in setting.integers else None)


# ---------------------------------------------------------------- convolutions


def _convolve(dims: int) -> Rule:
    function = getattr(F, f"conv{dims}d")

    def conv(
        setting: Setting, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Dual:  # fmt: skip
        spread = [
            rate * (size - 1) for rate, size in zip(_tuple(dilation, dims), weight.shape[2:], strict=True)
        ]
        if padding == "same":
            pads = [(width // 2, width - width // 2) for width in spread]
        else:
            pads = [(width, width) for width in _tuple(0 if padding == "valid" else padding, dims)]

        def on(x: Tensor, w: Tensor) -> Tensor:
            for axis, (left, right) in enumerate(pads):
                x = extend(x, axis - dims, left, right, setting.circular)
            return function(x, w, None, stride, 0, dilation, groups)

        return _biased(setting, product(setting, on, input, weight), bias, dims)

    return conv


def _convolve_transposed(dims: int) -> Rule:
    function = getattr(F, f"conv_transpose{dims}d")

    def conv(
        setting: Setting, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Dual:  # fmt: skip
        pads, more, steps = _tuple(padding, dims), _tuple(output_padding, dims), _tuple(stride, dims)
        rates, sizes = _tuple(dilation, dims), weight.shape[2:]

        def on(x: Tensor, w: Tensor) -> Tensor:
            lengths = [
                (n - 1) * s - 2 * p + d * (k - 1) + o + 1
                for n, s, p, d, k, o in zip(x.shape[-dims:], steps, pads, rates, sizes, more, strict=True)
            ]
            y = function(x, w, None, stride, 0, 0, groups, dilation)
            for axis in range(dims):
                y = wrap_around(y, axis - dims, pads[axis], lengths[axis], setting)
            return y

        return _biased(setting, product(setting, on, input, weight), bias, dims)

    return conv


def _biased(setting: Setting, x: Dual, bias: Any, dims: int) -> Dual:
    if bias is None:
        return x
    bias = move(setting, Tensor.reshape, (dual(bias), (-1, *[1] * dims)), {})
    return total(setting, x, bias)


for _dims_ in (1, 2, 3):
    RULES[f"conv{_dims_}d"] = _convolve(_dims_)
    RULES[f"conv_transpose{_dims_}d"] = _convolve_transposed(_dims_)


# ---------------------------------------------------------------- pools and resizing


def _window(
    setting: Setting, x: Dual, dims: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, top: bool
) -> Dual:  # fmt: skip
    """Sum over a window (maximum where max-pool paths are counted), one dimension after the other."""
    sizes = _tuple(kernel, dims)
    steps = sizes if stride is None or stride == [] else _tuple(stride, dims)
    pads, rates = _tuple(padding, dims), _tuple(dilation, dims)

    def on(t: Tensor) -> Tensor:
        for axis in range(dims):
            dim, length = axis - dims, t.shape[axis - dims]
            span, step, pad = rates[axis] * (sizes[axis] - 1) + 1, steps[axis], pads[axis]
            room = length + 2 * pad - span
            count = (-(-room // step) if ceil_mode else room // step) + 1
            if ceil_mode and (count - 1) * step >= length + pad:
                count -= 1
            needed = (count - 1) * step + span
            t = extend(t, dim, pad, needed - length - pad, setting.circular)
            t = t.unfold(dim, span, step)[..., :: rates[axis]]
            t = t.amax(-1) if top and setting.counting else t.sum(-1)
        return t

    return linear_map(setting, x, on)


def _average_pool(dims: int) -> Rule:
    def pool(
        setting: Setting, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
    ) -> Dual:  # fmt: skip
        return _window(setting, input, dims, kernel_size, stride, padding, 1, ceil_mode, top=False)

    return pool


def _max_pool(dims: int) -> Rule:
    def pool(
        setting: Setting, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Dual:  # fmt: skip
        if return_indices:
            raise UnknownOpError("no rule for max-pool indices")
        return _window(setting, input, dims, kernel_size, stride, padding, dilation, ceil_mode, top=True)

    return pool


def _along(t: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Multiply one dimension by an (outputs, inputs) matrix."""
    return (t.movedim(dim, -1) @ matrix.T).movedim(-1, dim)


def _adaptive_pool(dims: int, top: bool) -> Rule:
    def pool(setting: Setting, input: Any, output_size: Any, return_indices: bool = False) -> Dual:
        wanted = _tuple(output_size, dims) if output_size is not None else (None,) * dims

        def on(t: Tensor) -> Tensor:
            for axis, outputs in enumerate(wanted):
                dim, inputs = axis - dims, t.shape[axis - dims]
                if outputs is None:
                    continue
                bounds = [(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]
                parts = [t.narrow(dim, start, stop - start) for start, stop in bounds]
                reduced = [part.amax(dim) if top and setting.counting else part.sum(dim) for part in parts]
                t = torch.stack(reduced, dim)
            return t

        return linear_map(setting, input, on)

    return pool


for _dims_ in (1, 2, 3):
    RULES[f"avg_pool{_dims_}d"] = _average_pool(_dims_)
    RULES[f"max_pool{_dims_}d"] = _max_pool(_dims_)
    RULES[f"adaptive_avg_pool{_dims_}d"] = _adaptive_pool(_dims_, top=False)
    RULES[f"adaptive_max_pool{_dims_}d"] = _adaptive_pool(_dims_, top=True)


@rule("interpolate", "upsample")
def _interpolate(
    setting: Setting, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Dual:  # fmt: skip
    """Which positions are read, each with weight one; bicubic reads what bilinear does (its weights are signed)."""
    dims = input.dim() - 2
    if mode == "bicubic":
        mode = "bilinear"
    sizes = input.shape[2:]
    wanted = (
        _tuple(size, dims)
        if size is not None
        else tuple(int(n * f) for n, f in zip(sizes, _floats(scale_factor, dims), strict=True))
    )
    keywords: dict[str, Any] = {"antialias": antialias} if antialias else {}
    if mode in ("linear", "bilinear", "trilinear"):
        mode, keywords["align_corners"] = "bilinear", align_corners

    def matrix(inputs: int, outputs: int) -> Tensor:
        eye = torch.eye(inputs, dtype=torch.float64)[None, :, :, None]
        read = F.interpolate(eye, size=(outputs, 1), mode=mode, **keywords)[0, :, :, 0].T
        return (read > 1e-9).to(torch.float64)

    matrices = [matrix(n, m) for n, m in zip(sizes, wanted, strict=True)]

    def on(t: Tensor) -> Tensor:
        for axis, read in enumerate(matrices):
            t = _along(t, axis - dims, read)
        return t

    return linear_map(setting, input, on)


def _floats(value: Any, n: int) -> tuple[float, ...]:
    return (float(value),) * n if isinstance(value, int | float) else tuple(value)


# ---------------------------------------------------------------- norms


def _affine(setting: Setting, x: Dual, weight: Any, bias: Any, dims: int) -> Dual:
    """The affine part of a norm; `dims` dimensions follow the channels."""
    for operand, join in ((weight, scaled), (bias, total)):
        if operand is not None:
            operand = move(setting, Tensor.reshape, (dual(operand), (*operand.shape, *[1] * dims)), {})
            x = join(setting, x, operand)
    return x.copy()


@rule("batch_norm", "instance_norm")
def _batch_norm(
    setting: Setting, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, *args: Any, **kwargs: Any,
) -> Dual:  # fmt: skip
    return _affine(setting, input, weight, bias, input.dim() - 2)


@rule("group_norm")
def _group_norm(
    setting: Setting, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, **kwargs: Any
) -> Dual:  # fmt: skip
    return _affine(setting, input, weight, bias, input.dim() - 2)


@rule("layer_norm")
def _layer_norm(
    setting: Setting, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Dual:  # fmt: skip
    return _affine(setting, input, weight, bias, 0)


@rule("rms_norm")
def _rms_norm(
    setting: Setting, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Dual:
    return _affine(setting, input, weight, None, 0)


# ---------------------------------------------------------------- attention and recurrence


@rule("scaled_dot_product_attention")
def _attention(
    setting: Setting, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False, **kwargs: Any,
) -> Dual:  # fmt: skip
    """(1 + QK^T + mask) V."""
    if enable_gqa:
        copies = query.shape[-3] // key.shape[-3]
        key, value = (move(setting, torch.repeat_interleave, (t, copies, -3), {}) for t in (key, value))
    scores = product(setting, lambda q, k: q @ k.transpose(-2, -1), query, key)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
        scores.blocked = ~attn_mask.expand(scores.shape)
    elif attn_mask is not None:
        scores = _add(setting, scores, attn_mask)
    return product(setting, torch.matmul, _softmax(setting, scores), value)


@rule("multi_head_attention_forward")
def _multi_head(
    setting: Setting, query: Any, key: Any, value: Any, embed_dim_to_check: int, num_heads: int, in_proj_weight: Any,
    in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Any,
    out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Dual, Dual | None]:  # fmt: skip
    """`nn.MultiheadAttention` from its definition: (length, batch, width), or without the batch."""
    refused = (bias_k, bias_v, static_k, static_v, key_padding_mask)
    if add_zero_attn or any(item is not None for item in refused):
        raise UnknownOpError("no rule for nn.MultiheadAttention with added or padded keys")

    def of(function: Any, x: Any, *args: Any) -> Any:
        return move(setting, function, (x, *args), {})

    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        weights = of(torch.chunk, in_proj_weight, 3)
    biases = (None, None, None) if in_proj_bias is None else of(torch.chunk, in_proj_bias, 3)

    def heads(x: Any, place: int) -> Any:
        x = _linear(setting, x, weights[place], biases[place])
        x = of(Tensor.reshape, x, (*x.shape[:-1], num_heads, x.shape[-1] // num_heads))
        return of(torch.movedim, x, 0, -2)  # (batch, heads, length, width of a head)

    q, k, v = heads(query, 0), heads(key, 1), heads(value, 2)
    mixed = of(torch.movedim, _attention(setting, q, k, v, attn_mask, is_causal=is_causal), -2, 0)
    mixed = of(Tensor.reshape, mixed, (*mixed.shape[:-2], -1))
    scores = product(setting, lambda a, b: a @ b.transpose(-2, -1), q, k) if need_weights else None
    return _linear(setting, mixed, out_proj_weight, out_proj_bias), None if scores is None else never_zero(
        scores
    )


@rule("lstm")
def _lstm(
    setting: Setting, input: Any, state: Any, weights: Any, has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Dual, None, None]:  # fmt: skip
    """`nn.LSTM` from its definition; the gates are sigmoids, hence never Zero."""
    step = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    if len(weights) != step * directions * layers:
        raise UnknownOpError("no rule for nn.LSTM with projections")
    time = 1 if batch_first else 0
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            start = step * (layer * directions + direction)
            outputs.append(
                _scan(setting, input, weights[start : start + step], time, backward=direction == 1)
            )
        input = move(setting, torch.cat, (outputs, -1), {})
    return input, None, None


def _scan(setting: Setting, x: Dual, weights: Sequence[Any], time: int, backward: bool) -> Dual:
    steps = list(move(setting, torch.unbind, (x, time), {}))
    hidden = cell = constant((*steps[0].shape[:-1], weights[1].shape[1]), 0.0)
    outputs = []
    for step in reversed(steps) if backward else steps:
        gates = total(setting, _linear(setting, step, weights[0], *weights[2:3]),
                      _linear(setting, hidden, weights[1], *weights[3:4]))  # fmt: skip
        take, keep, new, out = move(setting, torch.chunk, (gates, 4, -1), {})
        kept = scaled(setting, never_zero(keep), cell)
        cell = total(setting, kept, scaled(setting, never_zero(take), new))
        hidden = scaled(setting, never_zero(out), cell)
        outputs.append(hidden)
    return move(setting, torch.stack, (outputs[::-1] if backward else outputs, time), {})


# ---------------------------------------------------------------- complex numbers


def _dense(setting: Setting, x: Dual, shape: Sequence[int], dims: Sequence[int]) -> Dual:
    """Every position along `dims` reaches every position: what a Fourier transform does to a pattern."""

    def on(t: Tensor) -> Tensor:
        return t.sum(tuple(dims), keepdim=True).expand(*shape)

    return linear_map(setting, x, on)


def _fourier(name: str, axes: int | None) -> Rule:
    function = getattr(torch.fft, name)

    def transform(setting: Setting, input: Any, s: Any = None, dim: Any = None, norm: Any = None) -> Dual:
        real = torch.zeros(input.shape, dtype=torch.float64)
        dims = dim if dim is not None else (tuple(range(-axes, 0)) if axes else tuple(range(input.dim())))
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        example = real if name.startswith("rfft") else real.to(torch.complex128)
        shape = function(example, s, dims[0] if axes == 1 else dims).shape
        return _dense(setting, input, shape, dims)

    return transform


for _name, _axes_ in (("rfft", 1), ("irfft", 1), ("fft", 1), ("ifft", 1), ("rfft2", 2), ("irfft2", 2), ("fft2", 2),
                      ("ifft2", 2), ("rfftn", None), ("irfftn", None), ("fftn", None), ("ifftn", None)):  # fmt: skip
    RULES[f"fft_{_name}"] = _fourier(_name, _axes_)


@rule("view_as_complex")
def _view_as_complex(setting: Setting, x: Dual) -> Dual:
    return linear_map(setting, x, lambda t: t.sum(-1))


@rule("view_as_real")
def _view_as_real(setting: Setting, x: Dual) -> Dual:
    return linear_map(setting, x, lambda t: torch.stack([t, t], -1))
