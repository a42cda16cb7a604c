"""Entries that meet several channels each: they go with these if these go as a whole, and else stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.channels.labels import Heads, Labels, Lines

__all__ = ["Whole", "settle"]


@dataclass(frozen=True, eq=False)
class Whole:
    """Labels ``one`` that each meet several labels of ``each``, along the axes where ``one`` has size one.

    A gate with one entry for each head is such. ``reason`` says why ``one`` cannot go if they go one by one.
    """

    one: Tensor
    each: Tensor
    reason: str
    place: str


def settle(labels: Labels, wholes: list[Whole]) -> None:
    """Tie what goes as a whole; fix the rest, and let no line of what it meets vanish.

    To be called when all other ties are known: what is read later may tie the channels of a line.
    """
    _hold_heads(labels)
    waiting, changed = list(wholes), True
    while changed:
        changed, left = False, []
        for whole in waiting:
            more = [axis for axis, size in enumerate(whole.one.shape) if size == 1 < whole.each.shape[axis]]
            roots = labels.root[whole.each]
            if bool((roots == roots.amax(more, keepdim=True)).all()):
                labels.tie(whole.one, whole.each)
                changed = True
            else:
                left.append(whole)
        waiting = left
    for whole in waiting:
        more = [axis for axis, size in enumerate(whole.one.shape) if size == 1 < whole.each.shape[axis]]
        lines = whole.each.movedim(more, tuple(range(-len(more), 0))).flatten(-len(more))
        if labels.are_heads(whole.one):  # as the number that a head of linear attention is divided by
            one = whole.one.movedim(more, tuple(range(-len(more), 0))).flatten(-len(more))[..., 0]
            one = one.expand(lines.shape[:-1]).flatten()
            labels.heads.append(Heads(one, lines.reshape(len(one), -1), whole.place))
            continue
        labels.fix(whole.one, whole.reason)
        labels.lines.append(Lines(lines.reshape(-1, lines.shape[-1]), -1, whole.place, stay=True))


def _hold_heads(labels: Labels) -> None:
    """Fix heads that are tied to channels, as where a layer mixes the scores of all heads."""
    own = torch.zeros(labels.count, dtype=torch.bool)
    for first, count in labels.first_heads:
        own[first : first + count] = True
    mixed = torch.zeros_like(own)
    mixed[labels.root[~own]] = True
    root = labels.root  # what is fixed here was mixed before
    for heads in labels.heads:
        labels.fix(heads.one[mixed[root[heads.one]]], f"{heads.place}: a head that meets other channels")
