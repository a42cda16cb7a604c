"""Settle which channels go along an axis of a value that several axes of others were moved into."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.channels.labels import FIXED, Factor, Labels

__all__ = ["merged"]


def merged(labels: Labels, found: Sequence[Factor], factor: Factor, reason: str) -> list[Factor]:
    """Return the factors of a value with one more; of two along the same axes one stays, and the other's
    channels are fixed for ``reason``.

    The first one stays, unless nothing of it can go, as it is known so far.
    """
    own = set(factor.axes)
    rivals = [other for other in found if own <= set(other.axes) or own >= set(other.axes)]
    if not rivals:
        return [*found, factor]
    if _stays(labels, factor):
        return list(found)
    if all(_stays(labels, other) for other in rivals):
        return [*(other for other in found if other not in rivals), factor]
    labels.fix(factor.labels, reason)
    return list(found)


def _stays(labels: Labels, factor: Factor) -> bool:
    """Whether no channel of a factor can go."""
    return bool((labels.root[factor.labels] <= FIXED).all())
