"""Convolutions, pools and resizing, zero-padded or periodic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oracle_rules.duals import (
    RULES,
    Dual,
    Rule,
    Setting,
    UnknownOpError,
    dual,
    linear_map,
    product,
    rule,
    total,
)
from oracle_rules.moves import extend, move, tuple_of, wrap_around


def _convolve(dims: int) -> Rule:
    function = getattr(F, f"conv{dims}d")

    def conv(
        setting: Setting, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Dual:  # fmt: skip
        spans = [d * (k - 1) for d, k in zip(tuple_of(dilation, dims), weight.shape[2:], strict=True)]
        if padding == "same":
            pads = [(span // 2, span - span // 2) for span in spans]
        else:
            pads = [(width, width) for width in tuple_of(0 if padding == "valid" else padding, dims)]

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
        steps, rates, sizes = tuple_of(stride, dims), tuple_of(dilation, dims), weight.shape[2:]
        pads, more = tuple_of(padding, dims), tuple_of(output_padding, dims)

        def on(x: Tensor, w: Tensor) -> Tensor:
            y = function(x, w, None, stride, 0, 0, groups, dilation)
            for axis in range(dims):
                whole = (x.shape[axis - dims] - 1) * steps[axis] + rates[axis] * (sizes[axis] - 1) + 1
                length = whole - 2 * pads[axis] + more[axis]
                y = wrap_around(y, axis - dims, pads[axis], length, setting.circular)
            return y

        return _biased(setting, product(setting, on, input, weight), bias, dims)

    return conv


def _biased(setting: Setting, x: Dual, bias: Any, dims: int) -> Dual:
    if bias is None:
        return x
    shaped = move(setting, Tensor.reshape, (dual(setting, bias), (-1, *[1] * dims)), {})
    return total(setting, x, shaped)


@dataclass(frozen=True)
class _Window:
    """One pooling window, per dimension."""

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    pads: tuple[int, ...]
    rates: tuple[int, ...]
    ceil_mode: bool

    def pool(self, t: Tensor, top: bool, circular: bool) -> Tensor:
        """Sum or maximum over each window, one dimension after the other."""
        dims = len(self.sizes)
        for axis in range(dims):
            dim, length = axis - dims, t.shape[axis - dims]
            step, pad, rate = self.steps[axis], self.pads[axis], self.rates[axis]
            span = rate * (self.sizes[axis] - 1) + 1
            room = length + 2 * pad - span
            count = (-(-room // step) if self.ceil_mode else room // step) + 1
            if self.ceil_mode and (count - 1) * step >= length + pad:
                count -= 1  # the last window must start inside the image or its left padding
            t = extend(t, dim, pad, (count - 1) * step + span - length - pad, circular)
            t = t.unfold(dim, span, step)[..., ::rate]
            t = t.amax(-1) if top else t.sum(-1)
        return t


def _window(dims: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> _Window:
    sizes = tuple_of(kernel, dims)
    steps = sizes if stride is None or stride == [] else tuple_of(stride, dims)
    return _Window(sizes, steps, tuple_of(padding, dims), tuple_of(dilation, dims), ceil_mode)


def _average_pool(dims: int) -> Rule:
    def pool(
        setting: Setting, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
    ) -> Dual:  # fmt: skip
        window = _window(dims, kernel_size, stride, padding, 1, ceil_mode)
        return linear_map(setting, input, lambda t: window.pool(t, False, setting.circular))

    return pool


def _max_pool(dims: int) -> Rule:
    def pool(
        setting: Setting, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
        dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
    ) -> Dual:  # fmt: skip
        if return_indices:
            raise UnknownOpError("no rule for max-pool indices")
        window = _window(dims, kernel_size, stride, padding, dilation, ceil_mode)
        return linear_map(setting, input, lambda t: window.pool(t, setting.counting, setting.circular))

    return pool


def _adaptive_pool(dims: int, top: bool) -> Rule:
    def pool(setting: Setting, input: Any, output_size: Any, return_indices: bool = False) -> Dual:
        wanted = (output_size,) * dims if output_size is None else tuple_of(output_size, dims)

        def on(t: Tensor) -> Tensor:
            for axis, outputs in enumerate(wanted):
                dim, inputs = axis - dims, t.shape[axis - dims]
                if outputs is None:
                    continue
                bounds = [(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]
                parts = [t.narrow(dim, start, stop - start) for start, stop in bounds]
                chosen = [part.amax(dim) if top and setting.counting else part.sum(dim) for part in parts]
                t = torch.stack(chosen, dim)
            return t

        return linear_map(setting, input, on)

    return pool


for _dims in (1, 2, 3):
    RULES[f"conv{_dims}d"] = _convolve(_dims)
    RULES[f"conv_transpose{_dims}d"] = _convolve_transposed(_dims)
    RULES[f"avg_pool{_dims}d"] = _average_pool(_dims)
    RULES[f"max_pool{_dims}d"] = _max_pool(_dims)
    RULES[f"adaptive_avg_pool{_dims}d"] = _adaptive_pool(_dims, top=False)
    RULES[f"adaptive_max_pool{_dims}d"] = _adaptive_pool(_dims, top=True)


@rule("interpolate", "upsample")
def _interpolate(
    setting: Setting, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Dual:  # fmt: skip
    """Each position that is read counts once; bicubic (whose weights are signed) reads what bilinear does."""
    dims, sizes = input.dim() - 2, input.shape[2:]
    if size is not None:
        wanted = tuple_of(size, dims)
    else:
        factors = (scale_factor,) * dims if isinstance(scale_factor, int | float) else tuple(scale_factor)
        wanted = tuple(int(n * factor) for n, factor in zip(sizes, factors, strict=True))
    linear = mode in ("linear", "bilinear", "trilinear", "bicubic")
    options: dict[str, Any] = {"align_corners": align_corners, "antialias": antialias} if linear else {}
    mode = "bilinear" if linear else mode

    def matrix(inputs: int, outputs: int) -> Tensor:
        eye = torch.eye(inputs, dtype=torch.float64)[None, :, :, None]
        read = F.interpolate(eye, size=(outputs, 1), mode=mode, **options)[0, :, :, 0]
        return (read > 1e-9).to(setting.dtype)

    matrices = [matrix(n, m) for n, m in zip(sizes, wanted, strict=True)]

    def on(t: Tensor) -> Tensor:
        for axis, read in enumerate(matrices):
            t = (t.movedim(axis - dims, -1) @ read).movedim(-1, axis - dims)
        return t

    return linear_map(setting, input, on)
