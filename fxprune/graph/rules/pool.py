"""Pooling and reductions: paths meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.builder import Constant
from fxprune.graph.rules.table import Context, RuleTable, Unknown

__all__ = ["table"]

table = RuleTable()


# -- whole axes ---------------------------------------------------------------------------------------------------
def _dims(x: ir.Value, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == ():
        return tuple(range(len(x.shape)))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _reduce(context: Context, x: Any, how: str, dim: Any, keepdim: bool) -> ir.Value:
    value = context.build.materialise(x)
    return context.build.reduce(value, how, _dims(value, dim), keepdim, context.shape)


@table.rule(torch.mean, "mean", torch.sum, "sum", torch.nansum, torch.amax, "amax", torch.amin, "amin")
@table.rule(torch.std, "std", torch.var, "var", torch.logsumexp, "logsumexp", torch.any, "any", torch.all, "all")
def reduce(context: Context, x: Any, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> ir.Value:
    """``y = pool of x over dim``."""
    if isinstance(x, ir.Value) and not isinstance(context.result, Tensor):
        raise Unknown("a reduction with several results")
    keepdim = kwargs.get("keepdims", keepdim) or any(a is True for a in args[:1])
    name = context.target if isinstance(context.target, str) else context.target.__name__
    how = {"mean": "mean", "amax": "max", "amin": "max", "std": "mean", "var": "mean"}.get(name, "sum")
    return _reduce(context, x, how, kwargs.get("axis", dim), keepdim)


@table.rule(torch.norm, "norm", torch.linalg.norm, torch.linalg.vector_norm)
def norm(context: Context, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> ir.Value:
    """A length: every entry along ``dim`` reaches it."""
    return _reduce(context, x, "mean", kwargs.get("axis", dim), kwargs.get("keepdims", keepdim))


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

    def run(t: Tensor) -> Tensor:
        return torch.cumsum(t, dim)

    size = x.shape[dim]
    return context.build.pool(x, "mean", (dim,), ir.WindowPool(run, run, (size + 1) / 2), context.shape)


# -- windows ------------------------------------------------------------------------------------------------------
def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(v) for v in value)


def window_total(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
) -> Tensor:
    """Sum over windows of the last axes, of output size ``out`` (windows may hang over the end): zeros outside."""
    rank = len(kernel)
    flat = x.reshape(-1, 1, *x.shape[-rank:])
    amounts: list[int] = []
    for d in reversed(range(rank)):
        need = (out[d] - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + 1
        amounts += [padding[d], max(0, need - padding[d] - flat.shape[2 + d])]
    flat = F.pad(flat, amounts)
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    total = conv(flat, ones, stride=tuple(stride), dilation=tuple(dilation))
    total = total[(..., *(slice(0, n) for n in out))]
    return total.reshape(*x.shape[:-rank], *out)


def _windowed(  # noqa: PLR0913
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
    padding, dilation = _tuple(padding, rank), _tuple(dilation, rank)
    out = context.shape[-rank:]

    def total(t: Tensor) -> Tensor:
        return window_total(t, kernel, stride, padding, dilation, out)

    window = ir.WindowPool(own, total, float(math.prod(kernel)))
    dims = tuple(range(-rank, 0))
    return context.build.pool(context.build.materialise(x), how, dims, window, context.shape)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _own(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    return lambda t: _first(function(t, *args, **kwargs))


_AVG = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_MAX = {F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3, torch.max_pool1d: 1, torch.max_pool2d: 2}


@table.rule(*_AVG)
def avg_pool(
    context: Context, x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any
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
    average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
    maximum = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[rank - 1]
    function = average if how == "mean" else maximum
    counts = torch.ones(())
    for n, m in zip(size, out, strict=True):
        width = torch.tensor([math.ceil((i + 1) * n / m) - i * n // m for i in range(m)], dtype=torch.float32)
        counts = counts[..., None] * width

    def total(t: Tensor) -> Tensor:
        pooled: Tensor = average(t, out)
        return pooled * counts.to(t)

    window = ir.WindowPool(_own(function, out), total, float(counts.mean()))
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
    """Resampling: every output entry is a mean of neighbours (cubic weights may be negative: read as linear)."""
    value, shape = context.build.materialise(x), context.shape
    rank = len(shape) - 2
    mode = kwargs.get("mode", args[2] if len(args) > 2 else getattr(context.module, "mode", "nearest"))
    mode = "bilinear" if mode == "bicubic" else mode
    align = None if mode.startswith("nearest") or mode == "area" else False

    def own(t: Tensor) -> Tensor:
        flat = t.reshape(-1, 1, *t.shape[-rank:])
        resized: Tensor = F.interpolate(flat, shape[-rank:], mode=mode, align_corners=align)
        return resized.reshape(*t.shape[:-rank], *shape[-rank:])

    return context.build.pool(value, "mean", tuple(range(-rank, 0)), ir.WindowPool(own, own, 1.0), shape)


