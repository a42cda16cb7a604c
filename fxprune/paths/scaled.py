"""Arithmetic of path counts, which leave every floating-point range: ``values * 2 ** power``.

:class:`Counted` and :class:`Tested` are the two arithmetics of the interpreter: numbers of paths, or zeros
and ones. Both are differentiable, and their powers are tensors, so that nothing waits for a device. The
functions at the end (:func:`square`, :func:`multiply`, :func:`add`) need no derivatives; their powers are
Python integers, and a tensor is rescaled only when its largest entry has drifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fxprune.paths.context import Pooling

__all__ = [
    "EMPTY", "Counted", "Scaled", "Tested", "add", "at_power", "moderated", "multiply", "normalise", "square",
    "zeros_like",
]  # fmt: skip

EMPTY = -(10**9)
"""The level of a tensor of zeros: below the power of any other tensor."""

Power = TypeVar("Power", Tensor, int)


@dataclass(frozen=True)
class Scaled(Generic[Power]):
    """``values * 2 ** power``: a non-negative number for each entry of a tensor.

    ``level`` is the power, or ``EMPTY`` where all values are zero. A tensor of zeros must not set the scale
    of a sum; its own power is still that of its derivatives.
    """

    values: Tensor
    power: Power
    level: Power

    def with_values(self, values: Tensor) -> Scaled[Power]:
        """Other values at the same power."""
        return Scaled(values, self.power, self.level)


# -- with derivatives: powers are tensors ---------------------------------------------------------------
class _Rescale(torch.autograd.Function):
    """Multiplies by a constant power of two; cuts the derivative off below the end of the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, is_weight: bool) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.is_weight = is_weight  # nothing multiplies the derivative of a weight any further
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        limits = (1e200, 1e300) if gradient.dtype == torch.float64 else (1e25, 1e36)
        return (gradient * factor).clamp(max=limits[ctx.is_weight]), None, None


def _mantissa_and_exponent(x: Tensor, *, is_weight: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``x = mantissa * 2 ** exponent``, the largest mantissa in (0.5, 1]; and whether any entry is positive.

    The exponent stays within the range of ``x``'s dtype, so that the factor is finite and not zero.
    """
    top = x.detach().amax().double() if x.numel() else torch.zeros((), dtype=torch.float64, device=x.device)
    is_positive = top > 0
    widest = 1000 if x.dtype == torch.float64 else 120
    exponent = torch.where(is_positive, top.log2().ceil(), torch.zeros_like(top)).clamp(-widest, widest)
    mantissa: Tensor = _Rescale.apply(x, torch.exp2(-exponent).to(x.dtype), is_weight)
    return mantissa, exponent, is_positive


def _at_power(value: Scaled[Tensor], power: Tensor) -> Tensor:
    """Mantissas of ``value`` at another power. A tensor of zeros may stand far above it: the factor is capped
    to stay finite.
    """
    factor = torch.exp2((value.power - power).clamp(max=64)).to(value.values.dtype)
    rescaled: Tensor = _Rescale.apply(value.values, factor, False)
    return rescaled


def moderated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as mantissa and exponent; those of ordinary size as they are, to save a copy."""
    top = float(x.detach().amax()) if x.numel() else 0.0
    if top == 0 or 2.0**-32 <= top <= 2.0**32:
        return x, torch.zeros((), dtype=torch.float64, device=x.device)
    return _mantissa_and_exponent(x, is_weight=True)[:2]


class Counted:
    """Arithmetic of numbers of paths.

    ``shares``: a product of two factors that both carry paths passes on their geometric mean instead of the
    sum, so that each factor has half of the flow.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, pooling: Pooling, *, shares: bool = False
    ) -> None:
        self.dtype, self.device, self.pooling, self.shares = dtype, device, pooling, shares

    def start(self, x: Tensor) -> Scaled[Tensor]:
        """Wrap the values of a source."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return Scaled(x.to(self.device, self.dtype), zero, zero)

    def normalise(self, x: Tensor, power: Tensor) -> Scaled[Tensor]:
        """``x * 2 ** power`` with its largest value in (0.5, 1]."""
        mantissa, more, is_positive = _mantissa_and_exponent(x)
        power = power + more
        return Scaled(mantissa, power, torch.where(is_positive, power, torch.full_like(power, EMPTY)))

    def align(self, terms: Sequence[Scaled[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """All mantissas at one power: the largest of those terms that are not zero throughout."""
        if len(terms) == 1:
            return [terms[0].values], terms[0].power
        top = torch.stack([term.level for term in terms]).amax()
        top = torch.where(top > EMPTY, top, terms[0].power)
        return [_at_power(term, top) for term in terms], top

    def join(self, a: Scaled[Tensor], b: Scaled[Tensor]) -> Scaled[Tensor]:
        """Combine the paths through the two factors of a product."""
        if not self.shares or EMPTY in (float(a.level), float(b.level)):
            (x, y), power = self.align([a, b])
            return self.normalise(x + y, power)
        power = (a.power + b.power) / 2
        both = (a.values > 0) & (b.values > 0)
        one = torch.ones((), dtype=a.values.dtype, device=a.values.device)
        mean = torch.where(both, a.values, one).sqrt() * torch.where(both, b.values, one).sqrt()
        return self.normalise(torch.where(both, mean, _at_power(a, power) + _at_power(b, power)), power)


class _Round(torch.autograd.Function):
    """Rounds non-negative integers to zero or one, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0.5).to(gradient.dtype)


class Tested:
    """Arithmetic of zeros and ones: is there any path?"""

    def __init__(self, device: torch.device) -> None:
        self.dtype, self.device = torch.float32, device
        self.pooling: Pooling = "any"

    def start(self, x: Tensor) -> Scaled[Tensor]:
        """Wrap the values of a source."""
        zero = torch.zeros((), device=self.device)
        return Scaled(x.to(self.device, self.dtype), zero, zero)

    def normalise(self, x: Tensor, power: Tensor) -> Scaled[Tensor]:
        """``x`` rounded to zero or one."""
        rounded: Tensor = _Round.apply(x)
        return Scaled(rounded, power, power)

    def align(self, terms: Sequence[Scaled[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """The values as they are."""
        return [term.values for term in terms], terms[0].power

    def join(self, a: Scaled[Tensor], b: Scaled[Tensor]) -> Scaled[Tensor]:
        """Combine the paths through the two factors of a product."""
        return self.normalise(a.values + b.values, a.power)


# -- without derivatives: powers are integers ------------------------------------------------------------
TARGET, SLACK = 32, 16
"""The largest entry lies between 2^16 and 2^48: sums of products of two such tensors stay finite in float32,
and entries far below the largest do not underflow."""


def normalise(values: Tensor, power: int) -> Scaled[int]:
    """``values * 2 ** power``, rescaled if its largest entry has drifted from 2 ** ``TARGET``."""
    top = float(values.amax()) if values.numel() else 0.0
    if top == 0:
        return Scaled(values, EMPTY, EMPTY)
    shift = max(math.frexp(top)[1] - TARGET, -120)  # the factor is a float32, too
    if abs(shift) > SLACK:
        values, power = values * 2.0**-shift, power + shift
    return Scaled(values, power, power)


def at_power(value: Scaled[int], power: int) -> Tensor:
    """Values at a power that is not smaller than their own; those that are too small for it become zero."""
    return value.values if value.power == power else value.values * math.ldexp(1.0, value.power - power)


def zeros_like(x: Tensor) -> Scaled[int]:
    """No paths at all, in float32."""
    return Scaled(torch.zeros_like(x, dtype=torch.float32), EMPTY, EMPTY)


def square(x: Tensor) -> Scaled[int]:
    """``x ** 2`` for any real ``x``, in float32."""
    low, high = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
    top = max(-low, high)
    if top == 0:
        return zeros_like(x)
    shift = max(math.frexp(top)[1], -120)
    return Scaled((x * 2.0**-shift).float().square(), 2 * shift, 2 * shift)


def multiply(product: Callable[[Tensor, Tensor], Tensor], a: Scaled[int], b: Scaled[int]) -> Scaled[int]:
    """``product(a, b)``, which must be linear in either factor."""
    return normalise(product(a.values, b.values), a.power + b.power)


def add(terms: Sequence[Scaled[int]], shape: torch.Size) -> Scaled[int]:
    """The sum of ``terms``, broadcast to ``shape``."""
    power = max(term.level for term in terms)
    first, *others = (at_power(term, power) for term in terms)
    if not others:
        return Scaled(first.expand(shape), power, power)
    for other in others:
        first = first + other
    return normalise(first, power)
