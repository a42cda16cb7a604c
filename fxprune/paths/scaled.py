"""Arithmetic of paths: numbers that leave every floating-point range, or mere zeros and ones.

In: tensors of paths. Out: the same as mantissas and powers of two (:class:`Counted`), or rounded to whether
there is any (:class:`Tested`). The interpreter is written once, over either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxprune.paths.context import Counting

__all__ = ["Counted", "Scaled", "Tested", "moderated"]

EMPTY = -1e18  # the scale (a power of two) of a tensor without any path: below every other


class _Rescale(torch.autograd.Function):
    """Multiplication by a constant power of two; the derivative is kept below the range's end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, last: bool) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.last = last  # a weight itself: nothing multiplies its derivative any more
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        limits = (1e200, 1e300) if gradient.dtype == torch.float64 else (1e25, 1e36)
        return (gradient * factor).clamp(max=limits[ctx.last]), None, None


def _normalised(x: Tensor, *, is_weight: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``x = mantissa * 2 ** scale``, the largest mantissa in (0.5, 1]; and whether x has any paths."""
    top = x.detach().amax().double() if x.numel() else torch.zeros((), dtype=torch.float64, device=x.device)
    is_live = top > 0
    widest = 1000 if x.dtype == torch.float64 else 120  # its inverse is finite, too
    exponent = torch.where(is_live, top.log2().ceil(), torch.zeros_like(top)).clamp(-widest, widest)
    rescaled: Tensor = _Rescale.apply(x, torch.exp2(-exponent).to(x.dtype), is_weight)
    return rescaled, exponent, is_live


def moderated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as mantissa and scale; ordinary ones as they are, since there are many of them."""
    top = float(x.detach().amax()) if x.numel() else 0.0
    if top == 0 or 2.0**-32 <= top <= 2.0**32:
        return x, torch.zeros((), dtype=torch.float64, device=x.device)
    return _normalised(x, is_weight=True)[:2]


class _Round(torch.autograd.Function):
    """Non-negative integers to zero or one, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0.5).to(gradient.dtype)


class Scaled(NamedTuple):
    """``x * 2 ** scale``. ``level`` is the scale, or far below every scale where x is zero throughout.

    A tensor without paths must not set the scale of a sum, but it has one: that of its derivatives.
    """

    x: Tensor
    scale: Tensor
    level: Tensor


class Counted:
    """Arithmetic of counts: mantissas and powers of two. ``shares``: both factors of a product have half of
    its flow.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, pool: Counting, *, shares: bool = False
    ) -> None:
        self.dtype, self.device, self.counting, self.shares = dtype, device, pool, shares

    def start(self, x: Tensor) -> Scaled:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return Scaled(x.to(self.device, self.dtype), zero, zero)

    def settle(self, x: Tensor, scale: Tensor) -> Scaled:
        mantissa, more, is_live = _normalised(x)
        scale = scale + more
        return Scaled(mantissa, scale, torch.where(is_live, scale, torch.full_like(scale, EMPTY)))

    def align(self, values: Sequence[Scaled]) -> tuple[list[Tensor], Tensor]:
        """All mantissas at one scale, the largest of those that have paths."""
        if len(values) == 1:
            return [values[0].x], values[0].scale
        top = torch.stack([value.level for value in values]).amax()
        top = torch.where(top > EMPTY, top, values[0].scale)
        return [
            _Rescale.apply(value.x, torch.exp2((value.scale - top).clamp(max=64)).to(value.x.dtype), False)
            for value in values
        ], top

    def join(self, a: Scaled, b: Scaled) -> Scaled:
        """The two halves of a product."""
        if not self.shares or EMPTY in (float(a.level), float(b.level)):
            (x, y), scale = self.align([a, b])
            return self.settle(x + y, scale)
        scale = (a.scale + b.scale) / 2
        both = (a.x > 0) & (b.x > 0)
        one = torch.ones((), dtype=a.x.dtype, device=a.x.device)
        mean = torch.where(both, a.x, one).sqrt() * torch.where(both, b.x, one).sqrt()
        x, y = (
            _Rescale.apply(value.x, torch.exp2((value.scale - scale).clamp(max=64)).to(value.x.dtype), False)
            for value in (a, b)
        )
        return self.settle(torch.where(both, mean, x + y), scale)


class Tested:
    """Arithmetic of zeros and ones: is there any path?"""

    def __init__(self, device: torch.device) -> None:
        self.dtype, self.device = torch.float32, device
        self.counting: Counting = "any"

    def start(self, x: Tensor) -> Scaled:
        zero = torch.zeros((), device=self.device)
        return Scaled(x.to(self.device, self.dtype), zero, zero)

    def settle(self, x: Tensor, scale: Tensor) -> Scaled:
        rounded: Tensor = _Round.apply(x)
        return Scaled(rounded, scale, scale)

    def align(self, values: Sequence[Scaled]) -> tuple[list[Tensor], Tensor]:
        return [value.x for value in values], values[0].scale

    def join(self, a: Scaled, b: Scaled) -> Scaled:
        return self.settle(a.x + b.x, a.scale)
