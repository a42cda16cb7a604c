"""Checks of the numbers that methods and loops are given: a value comes in, the same value or an error."""

from __future__ import annotations

import math


def integer(argument: str, value: object, least: int) -> int:
    """``value``, if it is an integer of at least ``least``; ``TypeError`` or ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}={value!r}: expected an integer of at least {least}")
    if value < least:
        raise ValueError(f"{argument}={value!r}: expected an integer of at least {least}")
    return value


def fraction(argument: str, value: object) -> float:
    """``value``, if it lies in (0, 1); ``TypeError`` or ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}={value!r}: expected a fraction in (0, 1)")
    if not 0 < value < 1:
        hint = f"; {value} percent is {value / 100:g}" if 1 < value < 100 else ""
        raise ValueError(f"{argument}={value!r}: expected a fraction in (0, 1){hint}")
    return float(value)


def positive(argument: str, value: object) -> float:
    """``value``, if it is a finite number above zero; ``TypeError`` or ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}={value!r}: expected a number above zero")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{argument}={value!r}: expected a number above zero")
    return float(value)
