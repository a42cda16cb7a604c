"""Settle which channels go along the axes of a value that entries of others were moved into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.channels.labels import FILLED, FIXED, Factor, Labels
from fxprune.graph import ir
from fxprune.lowering.rules.movement import set_item

__all__ = ["merged", "moved_labels"]


def moved_labels(labels: Labels, op: ir.Gather, parts: Sequence[Tensor]) -> Tensor:
    """Move labels as an op moves entries; constants that are written over channels go with these.

    What is stacked must have equal sizes: the same channels of all parts go together. ``parts``: the labels
    of each operand, of its full shape.
    """
    moved: Tensor = op.move(*parts)
    last = op.move.calls[-1] if op.move.calls else None
    if last is not None and last.target is torch.stack:
        given = last.kwargs.get("dim", last.args[1] if len(last.args) > 1 else 0)
        stacked = moved.movedim(int(given), 0).long()
        labels.tie(stacked, stacked[:1])
    writes = bool(op.move.calls) and op.move.calls[-1].target is set_item
    if not writes or moved.shape != parts[0].shape:
        return moved
    # A number that is not zero has the label of what cannot go; what another operand has it may be a path.
    constant = moved <= FIXED if len(parts) == 1 else moved == FILLED
    return parts[0].where(constant, moved)


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
