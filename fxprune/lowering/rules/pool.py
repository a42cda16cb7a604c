"""Pooling and reductions: paths meet."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.lowering.builder import Constant
from fxprune.lowering.periodic import fold_periodically
from fxprune.lowering.rules.pointwise import statistic
from fxprune.lowering.rules.table import Context, RuleTable, Unknown

__all__ = ["table"]

table = RuleTable()


# -- whole axes ----------------------------------------------------------------------------------
def _dims(x: ir.Value, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(len(x.shape)))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _reduce(context: Context, x: Any, how: str, dim: Any, keepdim: bool) -> ir.Value:
    value = context.build.materialise(x)
    return context.build.reduce(value, how, _dims(value, dim), keepdim, context.shape)


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
    torch.logsumexp,
    "logsumexp",
    torch.any,
    "any",
    torch.all,
    "all",
)


@table.rule(*_SUMS)
def add_up(context: Context, x: Any, *args: Any, keepdim: bool = False, **kwargs: Any) -> ir.Value:
    """``y = sum of x over some axes``."""
    dims, keepdim = _axes(args, keepdim, kwargs)
    return _reduce(context, x, "sum", dims, keepdim)


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
    return _reduce(context, x, "max", dims, keepdim)


@table.rule(
    torch.std, "std", torch.var, "var", torch.norm, "norm", torch.linalg.norm, torch.linalg.vector_norm
)
def spread(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """A spread or a length is what norms divide by: a scale, no path."""
    return statistic(context.shape)


@table.rule(torch.var_mean, torch.std_mean)
def moments(context: Context, x: Any, *args: Any, **kwargs: Any) -> tuple[Constant, Constant]:
    """Both are statistics: the mean that a norm subtracts is no path and no bias."""
    shape = tuple(context.result[0].shape)
    mean = replace(statistic(shape), evaluate=lambda: torch.zeros(shape), zero=True)
    return statistic(shape), mean


@table.rule(torch.max, "max", torch.min, "min", torch.median, "median")
def extreme(context: Context, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Largest entry along an axis (values; indices are constants), or of two tensors."""
    if isinstance(dim, (ir.Value, Constant)):
        values = [v for v in (x, dim) if isinstance(v, ir.Value)]
        return context.build.sum(values, context.shape)
    if isinstance(context.result, Tensor):
        return _reduce(context, x, "max", dim, keepdim)
    value, shape = context.build.materialise(x), tuple(context.result[0].shape)
    top = context.build.reduce(value, "max", _dims(value, dim), keepdim, shape)
    return (top, Constant(shape, torch.int64, lambda: torch.zeros(shape, dtype=torch.int64)))


@table.rule(torch.cumsum, "cumsum")
def cumsum(context: Context, x: Any, dim: int, **kwargs: Any) -> ir.Value:
    """Every entry reaches those after it on the axis."""
    return running_sum(context, context.build.materialise(x), dim)


def running_sum(context: Context, x: ir.Value, dim: int, *, backwards: bool = False) -> ir.Value:
    """Every entry reaches itself and those after it on the axis (``backwards``: before it)."""

    def run(t: Tensor) -> Tensor:
        return t.flip(dim).cumsum(dim).flip(dim) if backwards else t.cumsum(dim)

    return context.build.pool(x, "sum", (dim,), ir.WindowPool(run, run), x.shape)


# -- windows -------------------------------------------------------------------------------------
def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(v) for v in value)


@dataclass(frozen=True)
class Geometry:
    """A pooling window over the last axes; ``out`` is the output's size, the last windows may hang over the
    end.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]
    out: tuple[int, ...]

    def total(self, x: Tensor, *, periodic: bool = False) -> Tensor:
        """Sum over every window; beyond the image there are zeros, or the image again."""
        rank = len(self.kernel)
        flat = x.reshape(-1, 1, *x.shape[-rank:])
        # A part of the image may have been cut out, by whole strides.
        out = [
            m - (n - x.shape[d - rank]) // self.stride[d]
            for d, (n, m) in enumerate(zip(self.size, self.out, strict=True))
        ]
        for d in range(rank):
            size, before = x.shape[d - rank], self.padding[d]
            span = (out[d] - 1) * self.stride[d] + self.dilation[d] * (self.kernel[d] - 1) + 1
            index = torch.arange(-before, span - before, device=x.device)
            if periodic:
                flat = flat.index_select(2 + d, index % size)
            else:
                amounts = [0, 0] * (rank - 1 - d) + [before, max(0, span - before - size)]
                flat = F.pad(flat, amounts)
        ones = torch.ones((1, 1, *self.kernel), dtype=x.dtype, device=x.device)
        conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        total = conv(flat, ones, stride=self.stride, dilation=self.dilation)
        for d, n in enumerate(out):
            total = total.narrow(2 + d, 0, n)
        return total.reshape(*x.shape[:-rank], *out)


def _windowed(
    context: Context,
    x: Any,
    how: str,
    own: Callable[[Tensor], Tensor],
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
        geometry.total,
        functools.partial(geometry.total, periodic=True),
        ir.Window(kernel, stride, sides, dilation),
    )
    dims = tuple(range(-rank, 0))
    return context.build.pool(value, how, dims, window, context.shape)


def _first(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _own(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return lambda t: _first(function(t, *args, **kwargs))


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
    own = _own(context.target, kernel_size, stride, padding, *args, **kwargs)
    return _windowed(context, x, "mean", own, kernel_size, stride, padding, 1, _AVG[context.target])


@table.rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def avg_pool_module(context: Context, x: Any) -> ir.Value:
    m: Any = context.module
    rank = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[context.target]
    return _windowed(context, x, "mean", _own(m), m.kernel_size, m.stride, m.padding, 1, rank)


_MAX_MODULES = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


@table.rule(*_MAX_MODULES)
def max_pool_module(context: Context, x: Any) -> ir.Value:
    m: Any = context.module
    rank = _MAX_MODULES[context.target]
    if m.return_indices:
        raise Unknown("max pooling that returns indices")
    return _windowed(context, x, "max", _own(m), m.kernel_size, m.stride, m.padding, m.dilation, rank)


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
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    own = _own(function, kernel_size, stride, padding, dilation, ceil_mode)
    return _windowed(context, input, "max", own, kernel_size, stride, padding, dilation, rank)


def _adaptive(context: Context, x: Any, how: str, rank: int) -> ir.Value:
    value, shape = context.build.materialise(x), context.shape
    size, out = value.shape[-rank:], shape[-rank:]
    average: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
    maximum = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[rank - 1]
    function = average if how == "mean" else maximum
    counts = torch.ones(())
    for n, m in zip(size, out, strict=True):
        width = torch.tensor([math.ceil((i + 1) * n / m) - i * n // m for i in range(m)], dtype=torch.float32)
        counts = counts[..., None] * width

    def total(t: Tensor) -> Tensor:
        pooled: Tensor = average(t, out)
        return pooled * counts.to(t)

    window = ir.WindowPool(_own(function, out), total)
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


@table.rule(F.lp_pool2d, nn.LPPool2d)
def lp_pool(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    raise Unknown("power-average pooling")


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

    def resample(t: Tensor, by: Sequence[Tensor]) -> Tensor:
        for axis, matrix in enumerate(by):
            t = (t.movedim(axis - rank, -1) @ matrix.to(t)).movedim(-1, axis - rank)
        return t

    window = ir.WindowPool(lambda t: resample(t, matrices), lambda t: resample(t, reads))
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
    wide = tuple(size + 2 * pad for size, pad in zip(sizes, pads, strict=True))
    whole = given | {"output_size": wide, "padding": 0}

    def periodic(t: Tensor) -> Tensor:
        t = F.fold(t, **whole)
        for dim, pad, size in zip((-2, -1), pads, sizes, strict=True):
            t = fold_periodically(t, dim, pad, size)
        return t

    window = ir.WindowPool(lambda t: F.fold(t, **given), lambda t: F.fold(t, **given), periodic)
    return context.build.pool(value, "sum", (1, 2), window, context.shape)
