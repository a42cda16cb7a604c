"""Write lists of indices as runs, and read them back."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["indices", "runs"]


def runs(numbers: Sequence[int]) -> str:
    """Write indices as runs, in their order.

    >>> runs([0, 1, 2, 7, 9, 10])
    '0-2,7,9-10'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def indices(text: str) -> list[int]:
    """Undo :func:`runs`.

    >>> indices("0-2,7")
    [0, 1, 2, 7]
    """
    found: list[int] = []
    for part in text.split(",") if text else []:
        low, _, high = part.partition("-")
        found.extend(range(int(low), int(high or low) + 1))
    return found
