"""Duals and their algebra: the semantics of "effective path".

A rule that is missing raises `UnknownOpError`; nothing passes in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map


class UnknownOpError(RuntimeError):
    """The model used an operation that has no rule. (No TypeError: Python's operators would swallow it.)"""


@dataclass
class Setting:
    """Say how one run reads the model: counted or 0/1, zero-padded or periodic."""

    counting: bool
    circular: bool
    start: float = 1.0
    dtype: torch.dtype = torch.float64
    integers: set[int] = field(default_factory=set)

    def is_lookup(self, func: Any, args: Sequence[Any]) -> bool:
        """An embedding of an integer input starts paths."""
        return func is F.embedding and id(args[0]) in self.integers


class Round(torch.autograd.Function):
    """Non-negative integers to 0/1, forward and backward: patterns stay exact at any depth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0.5).to(gradient.dtype)


class Dual(Tensor):
    """A tensor of the model: `value` is 1 where it is not Zero, `paths` are the paths that end here.

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
    plain: Tensor | None  # a fresh constant (x.new_zeros): its numbers, for masks computed from them
    stale: Any  # the view through which this was changed, until it is written back

    @staticmethod
    def make(value: Tensor, paths: Tensor | None = None) -> Dual:
        if value.is_meta:
            raise UnknownOpError("a pattern needs values of a tensor on the meta device: give real ones")
        dual: Dual = Tensor._make_wrapper_subclass(Dual, value.shape, dtype=torch.float32)
        dual.value, dual.paths = value, paths
        dual.square, dual.mean_of, dual.blocked, dual.base, dual.stale = False, None, None, None, None
        dual.plain = None
        dual.version = dual.seen = 0
        return dual

    def copy(self) -> Dual:
        dual = Dual.make(self.value, self.paths)
        dual.square, dual.blocked = self.square, self.blocked
        return dual

    def seen_through(self, other: Dual) -> Dual:
        """Mark this as a view of `other`."""
        self.base = other if other.base is None else other.base
        self.seen = self.base.version
        return self

    def become(self, other: Dual) -> Dual:
        """In-place change. What shares this memory is marked, so that a later read of it cannot be wrong."""
        if self.value.shape != other.value.shape:
            raise UnknownOpError("an in-place operation changed a shape")
        if self.base is not None:
            self.base.stale = self
        self.value, self.paths, self.square, self.mean_of = other.value, other.paths, other.square, None
        self.blocked, self.plain = other.blocked, other.plain
        self.version += 1
        return self

    def check(self) -> Dual:
        changed = self.base is not None and (
            self.base.version != self.seen or (self.base.stale is not None and self.base.stale is not self)
        )
        if self.stale is not None or changed:
            raise UnknownOpError("a tensor is read after it was changed in place through a view")
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnknownOpError(f"{func} reached a dual below the rules")

    def __repr__(self) -> str:
        return f"Dual{tuple(self.value.shape)}"


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}  # rule(setting, *args, **kwargs), with the signature of the torch function
MOVES: dict[str, Rule] = {}  # rule(setting, function, args, kwargs)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of its torch functions."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


_PLAIN = set(
    """shape dtype device ndim is_cuda is_mps is_meta layout requires_grad is_leaf grad grad_fn is_sparse
    is_quantized is_nested is_mkldnn names itemsize nbytes is_cpu is_xpu is_xla size dim numel nelement
    ndimension is_contiguous stride element_size is_floating_point is_complex get_device storage_offset
    data_ptr __len__ __hash__ __repr__ __format__ is_tensor is_inference is_signed""".split()
)
_DUNDER = {"truediv": "div", "itruediv": "div", "rtruediv": "rdiv", "radd": "add", "rmul": "mul"}
_IN_PLACE = ("iadd", "isub", "imul", "idiv", "itruediv", "ipow")


def spelling(func: Any) -> tuple[str, bool]:
    """The name of a torch function, and whether it works in place."""
    name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    if name in ("__getitem__", "__setitem__", "__iter__") or name in _PLAIN:
        return name, False
    if name.startswith("__"):
        name = name.strip("_")
        in_place = name in _IN_PLACE
        return _DUNDER.get(name, name[1:] if in_place else name), in_place
    if name.endswith("_"):
        return name[:-1], True
    return name, False


def perform(setting: Setting, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One torch function on duals."""
    name, in_place = spelling(func)
    if name in _PLAIN:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if all(leaf.plain is not None for leaf in tree_leaves((args, kwargs)) if type(leaf) is Dual):
        return _on_numbers(setting, func, args, kwargs)
    if name == "__setitem__":
        return _setitem(setting, *args)
    for leaf in tree_leaves((args, kwargs)):
        if type(leaf) is Dual:
            leaf.check()
        elif isinstance(leaf, Tensor) and leaf.is_meta:
            return _without_values(setting, func, args, kwargs)
    in_place = in_place or kwargs.get("inplace") is True
    kwargs = {key: value for key, value in kwargs.items() if key not in ("inplace", "out")}
    if name in RULES:
        result = RULES[name](setting, *args, **kwargs)
    elif name in MOVES:
        result = MOVES[name](setting, func, args, kwargs)
    else:
        where = getattr(func, "__module__", None) or getattr(func, "__objclass__", type(None)).__name__
        raise UnknownOpError(f"no rule for {name!r} ({where})")
    if not in_place:
        return result
    if type(args[0]) is not Dual:
        raise UnknownOpError(f"{name!r} writes a dual into a plain tensor")
    same = result.value is args[0].value and result.paths is args[0].paths
    return args[0] if same else args[0].become(result)


def _on_numbers(setting: Setting, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fresh constants among themselves are numbers."""
    name, in_place = spelling(func)
    plain_args, plain_kwargs = tree_map(
        lambda leaf: leaf.plain if type(leaf) is Dual else leaf, (args, kwargs)
    )
    result = func(*plain_args, **plain_kwargs)
    if (in_place or name == "__setitem__") and type(args[0]) is Dual:
        args[0].value = dual(setting, args[0].plain).value
        return args[0]
    return result


def _without_values(setting: Setting, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An index on the meta device: into a constant that is not Zero anywhere, only shapes matter."""
    duals = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is Dual]
    constant_table = all(leaf.paths is None and bool(leaf.value.all()) for leaf in duals)
    if spelling(func)[0] not in ("__getitem__", "index_select", "gather") or not constant_table:
        raise UnknownOpError(
            f"{spelling(func)[0]!r} needs values of a tensor on the meta device: give real ones"
        )

    def shape_only(leaf: Any) -> Any:
        return torch.empty(leaf.shape, device="meta") if type(leaf) is Dual else leaf

    args, kwargs = tree_map(shape_only, (args, kwargs))
    return constant(setting, func(*args, **kwargs).shape)


def _setitem(setting: Setting, target: Any, index: Any, source: Any) -> None:
    if type(target) is not Dual:
        raise UnknownOpError("'__setitem__' writes a dual into a plain tensor")
    if target.stale is source and source is not None:
        target.stale = None  # x[i] += y: the view that was changed is being written back
    source = dual(setting, source)
    value, paths = target.value.detach().clone(), target.paths
    value[index] = source.value.detach()
    if paths is not None or source.paths is not None:
        paths = torch.zeros_like(value) if paths is None else paths.clone()
        paths[index] = paths_of(source)
    target.check().become(Dual.make(value, paths))


def dual(setting: Setting, x: Any, *, exact: bool = False) -> Dual:
    """A constant made in the forward counts by existence, as a bias does; zero throughout, it is Zero.

    `exact` keeps its zeros: in a contraction a constant is a matrix that selects (a one-hot, a pooling).
    """
    if type(x) is Dual:
        return x
    if not isinstance(x, Tensor):
        return constant(setting, (), float(x != 0))
    if exact:
        return Dual.make((x != 0).to("cpu", setting.dtype))
    return constant(setting, x.shape, float(bool((x != 0).any())))


def constant(setting: Setting, shape: Sequence[int], value: float = 1.0) -> Dual:
    """A constant of 0 or 1."""
    return Dual.make(torch.full(tuple(shape), value, dtype=setting.dtype))


def never_zero(x: Dual) -> Dual:
    """1 + x: the paths of x, and a value that is never Zero."""
    return Dual.make(torch.ones_like(x.value), x.paths)


def paths_of(x: Dual) -> Tensor:
    """The paths, zeros for a constant."""
    return torch.zeros_like(x.value) if x.paths is None else x.paths


def finished(setting: Setting, value: Tensor, paths: Tensor | None) -> Dual:
    """Round the value, and the paths unless they are counted; only a weight's value keeps its gradient."""
    if paths is not None or not value.requires_grad:
        value = (value.detach() > 0.5).to(setting.dtype)
    elif not setting.counting:
        value = Round.apply(value)
    if paths is not None and not setting.counting:
        paths = Round.apply(paths)
    return Dual.make(value, paths)


def linear_map(setting: Setting, x: Any, function: Callable[[Tensor], Tensor]) -> Dual:
    """A map whose coefficients are non-negative integers."""
    x = dual(setting, x)
    return finished(setting, function(x.value), None if x.paths is None else function(x.paths))


def total(setting: Setting, *terms: Any) -> Dual:
    """A sum (or a difference: signs never cancel)."""
    duals = [dual(setting, term) for term in terms]
    value = sum((term.value for term in duals[1:]), duals[0].value)
    live = [term.paths for term in duals if term.paths is not None]
    paths = sum(live, torch.zeros_like(value)) if live else None
    return finished(setting, value, paths)


def product(setting: Setting, function: Callable[..., Tensor], *factors: Any) -> Dual:
    """A multilinear map: paths through each factor, where the others are not Zero."""
    duals = [dual(setting, factor, exact=True) for factor in factors]
    values = [factor.value for factor in duals]
    derived = all(value.requires_grad for value in values)  # a product of weights is a weight
    paths: Tensor | None = None
    for place, factor in enumerate(duals):
        if factor.paths is not None:
            term = function(*values[:place], factor.paths, *values[place + 1 :])
            paths = term if paths is None else paths + term
    value = function(*(values if derived else [value.detach() for value in values]))
    return finished(setting, value, paths)


def scaled(setting: Setting, x: Any, y: Any) -> Dual:
    """Elementwise product. A weight keeps its gradient under a scale."""
    x, y = dual(setting, x), dual(setting, y)
    if x.paths is None and y.paths is None:
        return finished(setting, x.value * y.value, None)
    return product(setting, torch.mul, x, y)
