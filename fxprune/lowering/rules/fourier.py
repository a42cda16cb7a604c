"""Fourier transforms, and complex numbers made of two real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.rules.table import Context, RuleTable, describe

__all__ = ["table"]

table = RuleTable()


def _transform(axes: int | None) -> Callable[..., ir.Value]:
    def transform(
        context: Context, x: Any, s: Any = None, dim: Any = None, norm: Any = None, n: Any = None
    ) -> ir.Value:
        """Every position along the axes reaches every position."""
        build = context.build
        value = build.materialise(x)
        rank = len(value.shape)
        dims = range(-axes, 0) if dim is None and axes else range(rank) if dim is None else dim
        dims = [dims % rank] if isinstance(dims, int) else [d % rank for d in dims]
        shape = [1 if d in dims else size for d, size in enumerate(value.shape)]
        whole = build.map(value, floor=False, axes=dims)  # a channel of zeros has its place, too
        return build.affine(build.reduce(whole, "sum", dims, True, shape), context.shape)

    return transform


for _name in ("rfft", "irfft", "fft", "ifft", "hfft", "ihfft"):
    for _suffix, _axes in (("", 1), ("2", 2), ("n", None)):
        table.rule(getattr(torch.fft, _name + _suffix))(_transform(_axes))


@table.rule(torch.stft, "stft", torch.istft, "istft")
def frames(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """Every sample of a signal reaches every frame and frequency, and the other way; a zero has its place."""
    build, value, shape = context.build, context.build.materialise(x), context.shape
    back = describe(context.target) == "istft"
    axes = 1
    if back:
        axes = 3 if len(value.shape) - len(shape) == 2 else 2
    kept = [*value.shape[: len(value.shape) - axes], *[1] * axes]
    dims = range(len(kept) - axes, len(kept))
    value = build.reduce(build.map(value, floor=True, axes=dims), "sum", dims, True, kept)
    one = [*kept[: len(kept) - axes], *[1] * (len(shape) - len(kept) + axes)]
    return build.affine(build.gather(TensorFunction.of("reshape", PREVIOUS, one), [value], one), shape)


@table.rule(torch.polar)
def polar(context: Context, length: Any, angle: Any) -> ir.Value | Constant:
    """``y = length * exp(i angle)``: an angle of Zero turns nothing away."""
    build, shape = context.build, context.shape
    if not isinstance(length, ir.Value):
        return build.map(build.affine(angle, shape), floor=True)
    if not isinstance(angle, ir.Value):
        return build.affine(length, shape)
    return build.gate(length, build.map(angle, floor=True), shape)


@table.rule(torch.complex)
def complex_of(context: Context, real: Any, imaginary: Any) -> ir.Value:
    """Both parts make the number."""
    return context.build.sum([context.build.materialise(x) for x in (real, imaginary)], context.shape)


@table.rule(torch.view_as_complex, "view_as_complex")
def view_as_complex(context: Context, x: Any) -> ir.Value:
    """Both parts make the number."""
    value = context.build.materialise(x)
    return context.build.reduce(value, "sum", (len(value.shape) - 1,), False, context.shape)


@table.rule(torch.view_as_real, "view_as_real")
def view_as_real(context: Context, x: Any) -> ir.Value:
    """The number makes both parts."""
    value, shape = context.build.materialise(x), context.shape
    both = TensorFunction.of("unsqueeze", PREVIOUS, -1).then("expand", PREVIOUS, shape)
    return context.build.gather(both, [value], shape)
