"""Pooling and reductions: paths meet."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.choices import numbers
from fxprune.lowering.rules.pointwise import statistic
from fxprune.lowering.rules.table import Context, RuleTable, Unknown, describe
from fxprune.lowering.scales import only_scales, scales_its_source
from fxprune.lowering.window_sums import (
    Geometry,
    adaptive_sum,
    fold_on_torus,
    resample,
    running_sum,
    window_sum,
)
from fxprune.torch_private import all_true, any_true

__all__ = ["table"]

table = RuleTable()


# -- whole axes ----------------------------------------------------------------------------------
def _dims(x: ir.Value, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(len(x.shape)))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _reduce(context: Context, x: Any, how: str, dim: Any, keepdim: bool, extreme: str = "") -> ir.Value:
    value = context.build.materialise(x)
    return context.build.reduce(value, how, _dims(value, dim), keepdim, context.shape, extreme=extreme)


def _extreme(context: Context) -> str:
    """Tell whether an op gives the largest or smallest entry, if nobody asks where it stood."""
    found = {"max": "largest", "amax": "largest", "min": "smallest", "amin": "smallest"}
    values_alone = isinstance(context.result, Tensor) or all(
        user.target is operator.getitem and user.args[1] == 0 for user in context.node.users
    )
    return found.get(describe(context.target).rpartition(".")[2], "") if values_alone else ""


def _axes(args: tuple[Any, ...], keepdim: bool, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """``x.sum(1, 2)``, ``x.sum((1, 2), True)``, ``x.sum(dim=1)``, ``x.sum(axis=1)``: axes and keepdim."""
    keepdim = kwargs.get("keepdims", keepdim)
    if args and isinstance(args[-1], bool):
        args, keepdim = args[:-1], args[-1]
    dims = args[0] if len(args) == 1 else args or kwargs.get("dim", kwargs.get("axis"))
    return dims, keepdim


_SUMS = (
    torch.sum,
    "sum",
    torch.nansum,
    "nansum",
    torch.any,
    "any",
    torch.all,
    "all",
    all_true,
    any_true,
)


@table.rule(*_SUMS)
def add_up(context: Context, x: Any, *args: Any, keepdim: bool = False, **kwargs: Any) -> ir.Value | Constant:
    """``y = sum of x over some axes``; that of a square that scales what was squared is a scale, no path."""
    if x.index in context.build.squares and scales_its_source(context.node):
        return statistic(context.shape)
    dims, keepdim = _axes(args, keepdim, kwargs)
    return _reduce(context, x, "sum", dims, keepdim)


@table.rule(torch.logsumexp, "logsumexp")
def log_of_sum(context: Context, x: Any, *args: Any, keepdim: bool = False, **kwargs: Any) -> ir.Value:
    """``y = log(sum of exp(x))``: an entry that is Zero adds one to the sum, as in a softmax."""
    dims, keepdim = _axes(args, keepdim, kwargs)
    value = context.build.materialise(x)
    value = context.build.map(value, floor=True, axes=_dims(value, dims))
    return _reduce(context, value, "sum", dims, keepdim)


@table.rule(torch.prod, "prod", torch.quantile, "quantile", torch.nanquantile, "nanquantile")
@table.rule(torch.nanmedian, "nanmedian", torch.aminmax, "aminmax")
def any_entry(context: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Every entry along the axis reaches the result, and none may go without a change of it."""
    result, value = context.result, context.build.materialise(x)
    top = result if isinstance(result, Tensor) else result[0]
    rest = args[1:] if "quantile" in describe(context.target) else args
    dim = kwargs.get("dim", rest[0] if rest else None)
    keepdim = len(top.shape) == len(value.shape)
    if dim is not None and len(top.shape) not in (len(value.shape), len(value.shape) - 1):
        raise Unknown("several quantiles at once")
    found = context.build.reduce(value, "max", _dims(value, dim), keepdim, tuple(top.shape))
    return found if isinstance(result, Tensor) else type(result)((found, found))


@table.rule(torch.diff, "diff")
def differences(context: Context, x: Any, n: int = 1, dim: int = -1, *args: Any, **kwargs: Any) -> ir.Value:
    """``y[i] = x[i + 1] - x[i]``, ``n`` times."""
    if args or "prepend" in kwargs or "append" in kwargs:
        raise Unknown("differences of what is put together")
    build, value = context.build, context.build.materialise(x)
    for _ in range(n):
        axis = dim % len(value.shape)
        shape = [size - (d == axis) for d, size in enumerate(value.shape)]
        parts = [TensorFunction.of("narrow", PREVIOUS, axis, first, shape[axis]) for first in (1, 0)]
        value = build.sum([build.gather(part, [value], shape) for part in parts], shape)
    return value


@table.rule(torch.mean, "mean")
def mean(context: Context, x: Any, *args: Any, keepdim: bool = False, **kwargs: Any) -> ir.Value | Constant:
    """A mean; that of a square is a second moment, a statistic: a scale, no path."""
    dims, keepdim = _axes(args, keepdim, kwargs)
    if x.index in context.build.squares:
        return statistic(context.shape)
    result = _reduce(context, x, "mean", dims, keepdim)
    context.build.mean_of[result.index] = x.index, _dims(x, dims)
    return result


@table.rule(torch.amax, "amax", torch.amin, "amin")
def extremum(context: Context, x: Any, *args: Any, keepdim: bool = False, **kwargs: Any) -> ir.Value:
    dims, keepdim = _axes(args, keepdim, kwargs)
    return _reduce(context, x, "max", dims, keepdim, _extreme(context))


@table.rule(
    torch.std, "std", torch.var, "var", torch.norm, "norm", torch.linalg.norm, torch.linalg.vector_norm
)
def spread(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value | Constant:
    """A spread or a length that a norm divides by is a scale, no path; any other is a number of its own."""
    if only_scales(context.node):
        return statistic(context.shape)
    build, value = context.build, context.build.materialise(x)
    is_length = "norm" in describe(context.target)
    places = args[1:] if is_length else [a for a in args if not isinstance(a, bool)]
    dims = _dims(value, kwargs.get("dim", kwargs.get("axis", places[0] if places else None)))
    if not is_length:
        value = build.map(value, floor=True)  # a zero counts: it is away from the mean
    return build.reduce(value, "sum", dims, len(context.shape) == len(value.shape), context.shape)


@table.rule(torch.var_mean, torch.std_mean)
def moments(context: Context, x: Any, *args: Any, **kwargs: Any) -> tuple[Constant, Constant]:
    """Both are statistics: the mean that a norm subtracts is no path and no bias."""
    shape = tuple(context.result[0].shape)
    mean = replace(statistic(shape), evaluate=lambda: torch.zeros(shape), zero=True)
    return statistic(shape), mean


@table.rule(torch.max, "max", torch.min, "min", torch.median, "median")
def extreme(context: Context, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Largest entry along an axis (the places carry no path), or of two tensors."""
    if isinstance(dim, (ir.Value, Constant)):
        values = [v for v in (x, dim) if isinstance(v, ir.Value)]
        return context.build.sum(values, context.shape)
    if isinstance(context.result, Tensor):
        return _reduce(context, x, "max", dim, keepdim, _extreme(context))
    value, shape = context.build.materialise(x), tuple(context.result[0].shape)
    top = context.build.reduce(value, "max", _dims(value, dim), keepdim, shape, extreme=_extreme(context))
    return top, numbers(context, context.result[1])


@table.rule(torch.cumsum, "cumsum", "cumsum_", torch.cumprod, "cumprod", torch.logcumsumexp, "logcumsumexp")
def cumsum(context: Context, x: Any, dim: int, **kwargs: Any) -> ir.Value:
    """Every entry reaches those after it on the axis; products and logs of sums count as present."""
    value = context.build.materialise(x)
    if context.target not in (torch.cumsum, "cumsum", "cumsum_"):
        value = context.build.map(value, floor=True)
    return accumulate(context, value, dim)


def accumulate(context: Context, x: ir.Value, dim: int, *, backwards: bool = False) -> ir.Value:
    """Every entry reaches itself and those after it on the axis (``backwards``: before it)."""
    run = TensorFunction.of(running_sum, PREVIOUS, dim, backwards=backwards)
    return context.build.pool(x, "sum", (dim,), ir.WindowPool(run, run), x.shape)


# -- windows -------------------------------------------------------------------------------------
def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(v) for v in value)


def _windowed(
    context: Context,
    x: Any,
    how: str,
    own: TensorFunction,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    rank: int,
) -> ir.Value:
    kernel = _tuple(kernel, rank)
    stride = kernel if stride is None or stride == [] else _tuple(stride, rank)
    value = context.build.materialise(x)
    padding, dilation = _tuple(padding, rank), _tuple(dilation, rank)
    geometry = Geometry(kernel, stride, padding, dilation, value.shape[-rank:], context.shape[-rank:])
    sides = tuple((p, p) for p in padding)
    window = ir.WindowPool(
        own,
        TensorFunction.of(window_sum, PREVIOUS, geometry),
        TensorFunction.of(window_sum, PREVIOUS, geometry, periodic=True),
        ir.Window(kernel, stride, sides, dilation),
    )
    dims = tuple(range(-rank, 0))
    return context.build.pool(value, how, dims, window, context.shape)


_AVG = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_MAX = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3, torch.max_pool1d: 1, torch.max_pool2d: 2}


@table.rule(*_AVG)
def avg_pool(
    context: Context,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> ir.Value:
    own = TensorFunction.of(context.target, PREVIOUS, kernel_size, stride, padding, *args, **kwargs)
    return _windowed(context, x, "mean", own, kernel_size, stride, padding, 1, _AVG[context.target])


@table.rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def avg_pool_module(context: Context, x: Any) -> ir.Value:
    m: Any = context.module
    rank = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[context.target]
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    more = [m.divisor_override] if rank > 1 else []
    own = TensorFunction.of(
        function, PREVIOUS, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, *more
    )
    return _windowed(context, x, "mean", own, m.kernel_size, m.stride, m.padding, 1, rank)


_MAX_MODULES = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


@table.rule(*_MAX_MODULES)
def max_pool_module(context: Context, x: Any) -> ir.Value:
    m: Any = context.module
    rank = _MAX_MODULES[context.target]
    if m.return_indices:
        raise Unknown("max pooling that returns indices")
    own = _maximum(rank, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    return _windowed(context, x, "max", own, m.kernel_size, m.stride, m.padding, m.dilation, rank)


def _maximum(rank: int, *options: Any) -> TensorFunction:
    # Not F.max_pool: those are dispatchers without a name of their own.
    return TensorFunction.of(
        (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[rank - 1], PREVIOUS, *options
    )


# Boolean-dispatched: fx records the dispatcher or its branch, depending on how the caller spelled it.
_MAX_FUNCTIONS: dict[Any, int] = dict(_MAX)
for _rank, _name in ((1, "max_pool1d"), (2, "max_pool2d"), (3, "max_pool3d")):
    for _room, _spelling in ((F, f"_{_name}"), (torch, _name)):
        if hasattr(_room, _spelling):
            _MAX_FUNCTIONS[getattr(_room, _spelling)] = _rank


@table.rule(*_MAX_FUNCTIONS)
def max_pool(
    context: Context,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> ir.Value:
    if return_indices:
        raise Unknown("max pooling that returns indices")
    rank = _MAX_FUNCTIONS[context.target]
    stride = kernel_size if stride is None or stride == [] else stride
    own = _maximum(rank, kernel_size, stride, padding, dilation, ceil_mode)
    return _windowed(context, input, "max", own, kernel_size, stride, padding, dilation, rank)


def _adaptive(context: Context, x: Any, how: str, rank: int) -> ir.Value:
    value, shape = context.build.materialise(x), context.shape
    out = tuple(shape[-rank:])
    # Not F.adaptive_max_pool: those are dispatchers without a name of their own.
    name = "adaptive_avg_pool" if how == "mean" else "_adaptive_max_pool"
    own = TensorFunction.of(getattr(F, f"{name}{rank}d"), PREVIOUS, out)
    window = ir.WindowPool(own, TensorFunction.of(adaptive_sum, PREVIOUS, out))
    return context.build.pool(value, how, tuple(range(-rank, 0)), window, shape)


_ADAPTIVE: dict[Any, tuple[str, int]] = {
    nn.AdaptiveAvgPool1d: ("mean", 1),
    nn.AdaptiveAvgPool2d: ("mean", 2),
    nn.AdaptiveAvgPool3d: ("mean", 3),
    nn.AdaptiveMaxPool1d: ("max", 1),
    nn.AdaptiveMaxPool2d: ("max", 2),
    nn.AdaptiveMaxPool3d: ("max", 3),
    F.adaptive_avg_pool1d: ("mean", 1),
    F.adaptive_avg_pool2d: ("mean", 2),
    F.adaptive_avg_pool3d: ("mean", 3),
    F.adaptive_max_pool1d: ("max", 1),
    F.adaptive_max_pool2d: ("max", 2),
    F.adaptive_max_pool3d: ("max", 3),
}


@table.rule(*_ADAPTIVE)
def adaptive_pool(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    how, rank = _ADAPTIVE[context.target]
    return _adaptive(context, x, how, rank)


@table.rule(F.lp_pool1d, F.lp_pool2d, F.lp_pool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
def lp_pool(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """``y = (sum of x^p)^(1/p)`` over every window: present where an entry of it is."""
    rank = len(context.shape) - 2
    given = dict(zip(("norm_type", "kernel_size", "stride", "ceil_mode"), args, strict=False)) | kwargs
    if context.module is not None:
        given = {name: getattr(context.module, name) for name in ("kernel_size", "stride", "ceil_mode")}
    kernel, stride = _tuple(given["kernel_size"], rank), given.get("stride")
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    ceil = bool(given.get("ceil_mode"))
    own = TensorFunction.of(function, PREVIOUS, kernel, stride, 0, ceil)
    return _windowed(context, x, "mean", own, kernel, stride, 0, 1, rank)


@table.rule(F.interpolate, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)
def interpolate(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """Resampling: an output entry is a mean of the entries that it reads (cubic reads what linear reads)."""
    value, shape = context.build.materialise(x), context.shape
    rank = len(shape) - 2
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given = dict(zip(names, args, strict=False)) | kwargs
    for name in ("mode", "align_corners"):
        given.setdefault(name, getattr(context.module, name, None))
    mode = given["mode"] or "nearest"
    options: dict[str, Any] = {}
    if mode in ("linear", "bilinear", "trilinear", "bicubic"):
        options = {"align_corners": given["align_corners"], "antialias": given.get("antialias") or False}
        mode = "bilinear"

    def weights(n: int, m: int) -> Tensor:
        eye = torch.eye(n, dtype=torch.float64)[None, :, :, None]
        return F.interpolate(eye, size=(m, 1), mode=mode, **options)[0, :, :, 0]

    matrices = [weights(n, m) for n, m in zip(value.shape[-rank:], shape[-rank:], strict=True)]
    reads = [(matrix > 1e-9).double() for matrix in matrices]
    own, total = (TensorFunction.of(resample, PREVIOUS, by) for by in (matrices, reads))
    window = ir.WindowPool(own, total)
    return context.build.pool(value, "mean", tuple(range(-rank, 0)), window, shape)


@table.rule(F.fold, nn.Fold)
def fold(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """Patches put back in place, overlaps added."""
    names = ("output_size", "kernel_size", "dilation", "padding", "stride")
    given = dict(zip(names, args, strict=False)) | kwargs
    if context.module is not None:
        given = {name: getattr(context.module, name) for name in names}
    value = context.build.materialise(x)
    if len(value.shape) != 3:
        raise Unknown("fold of a single sample")
    sizes, pads = _tuple(given["output_size"], 2), _tuple(given.get("padding", 0), 2)
    own = TensorFunction.of(F.fold, PREVIOUS, **given)
    kernel, dilation, stride = given["kernel_size"], given.get("dilation", 1), given.get("stride", 1)
    periodic = TensorFunction.of(fold_on_torus, PREVIOUS, sizes, kernel, dilation, pads, stride)
    window = ir.WindowPool(own, own, periodic)
    return context.build.pool(value, "sum", (1, 2), window, context.shape)
