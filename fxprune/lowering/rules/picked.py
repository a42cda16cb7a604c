"""Parameters of which the input picks one of many: the matrices of experts, ``weight[chosen]``.

Any of them may be picked, so that a product with what was picked is the product with each, and then any of
these.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.builder import Builder
from fxprune.lowering.constant import Constant, Joined

__all__ = ["Many", "note_picked", "one_of_many"]

Factor = ir.Value | Constant


@dataclass(frozen=True)
class Picked:
    """Remember that a value is ``whole``, of which an index with ``rank`` axes picked along ``axis``."""

    whole: Constant
    axis: int
    rank: int


def note_picked(build: Builder, value: ir.Value, whole: Factor, axis: int, rank: int) -> ir.Value:
    """Return ``value``, remembered as picked from ``whole``, if that is a parameter, or several joined."""
    if isinstance(whole, Constant) and (whole.weight is not None or whole.joined is not None):
        build.picked[value.index] = Picked(whole, axis, rank)
    return value


@dataclass(frozen=True)
class Many:
    """A product with all that may be picked, whose first axis tells them apart.

    ``equation`` and ``factors`` have ``shape``; ``out`` are the letters wanted, ``sizes`` those of all.
    """

    equation: str
    factors: tuple[Factor, Factor]
    shape: tuple[int, ...]
    out: str
    sizes: dict[str, int]

    def any_of(self, build: Builder, each: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Take any of the products, repeat it along the axes of the index alone, and add up the picks."""
        found = build.reduce(each, "max", (0,), False, self.shape[1:])
        have = self.equation.rpartition(">")[2][1:]
        full = self.out + "".join(c for c in have if c not in self.out)
        missing = [place for place, c in enumerate(full) if c not in have]
        if missing:
            spread, one = TensorFunction(), list(self.shape[1:])
            for place in missing:
                spread = spread.then("unsqueeze", PREVIOUS, place)
                one.insert(place, 1)
            found = build.gather(spread, [found], one)
        found = build.affine(found, [self.sizes[c] for c in full])
        if len(full) > len(self.out):
            found = build.reduce(found, "sum", range(len(self.out), len(full)), False, shape)
        return found


def one_of_many(build: Builder, equation: str, factors: tuple[Factor, Factor]) -> Many | None:
    """Write ``einsum(equation, *factors)`` of two values as a product with all that one was picked from.

    None if none of them was picked from parameters, or was changed since other than by moving axes or
    entries of each pick.
    """
    *terms, out = equation.replace("->", ",").split(",")
    for place, value in enumerate(factors):
        other = factors[1 - place]
        if not isinstance(value, ir.Value) or not isinstance(other, ir.Value):
            return None
        found = _whole_behind(build, value)
        if found is None:
            continue
        whole, own = found
        letters, x = terms[place], terms[1 - place]
        index = [c for axis, c in enumerate(letters) if axis not in own]
        if any(c not in x and c not in out for c in index):
            continue
        new = next(c for c in string.ascii_letters if c not in equation)
        sizes = dict(zip(x, other.shape, strict=True))
        for c, size in zip(letters, value.shape, strict=True):
            sizes[c] = max(size, sizes.get(c, 1))
        kept = [c for c in out if c not in index or c in x]
        kept += [c for c in index if c in x and c not in out]
        shape = [other.shape[x.index(c)] if c in index else sizes[c] for c in kept]
        text = f"{x},{new}{''.join(letters[axis] for axis in own)}->{new}{''.join(kept)}"
        return Many(text, (other, whole), (whole.shape[0], *shape), out, sizes)
    return None


def _whole_behind(build: Builder, value: ir.Value) -> tuple[Constant, list[int]] | None:
    """Find what a value was picked from, moved as the value was, and the axes that the two share.

    Its first axis is that along which one is picked.
    """
    if not build.picked:
        return None
    moves: list[TensorFunction] = []
    at = value
    for op in reversed(build.ops):
        if at.index in build.picked:
            break
        if op.output.index == at.index:
            if not isinstance(op, ir.Gather) or len(op.inputs) != 1:
                return None
            moves.append(op.move)
            (at,) = op.inputs
    picked = build.picked.get(at.index)
    if picked is None:
        return None
    axis, shape = picked.axis, picked.whole.shape
    own, index = (*shape[:axis], *shape[axis + 1 :]), at.shape[axis : axis + picked.rank]
    within = torch.arange(math.prod(own)).reshape(*own[:axis], *[1] * len(index), *own[axis:])
    which = torch.arange(math.prod(index)).reshape(*[1] * axis, *index, *[1] * (len(own) - axis))
    seen, picks = within.expand(at.shape), which.expand(at.shape)
    for move in reversed(moves):
        seen, picks = move(seen), move(picks)
    axes = [axis for axis in range(seen.dim()) if _varies(seen, axis)]
    if any(_varies(picks, axis) for axis in axes):
        return None
    entries = seen[tuple(slice(None) if axis in axes else 0 for axis in range(seen.dim()))]
    return _moved(picked, entries, own), axes


def _varies(x: Tensor, axis: int) -> bool:
    if x.shape[axis] < 2 or not x.stride(axis):
        return False
    return not bool((x == x.narrow(axis, 0, 1)).all())


def _moved(picked: Picked, entries: Tensor, own: tuple[int, ...]) -> Constant:
    """Bring the axis of the picks to the front, and ``entries`` of each behind it."""
    view = TensorFunction()
    if picked.axis:
        view = view.then("movedim", PREVIOUS, picked.axis, 0)
    order = _order(entries, own)
    if order is None:
        view = view.then("flatten", PREVIOUS, 1).then(getitem, PREVIOUS, (slice(None), entries))
    elif order != list(range(len(own))):
        view = view.then("permute", PREVIOUS, [0, *(axis + 1 for axis in order)])
    whole, joined = picked.whole, picked.whole.joined
    if view == TensorFunction():
        return whole
    moved = whole.moved(view, (whole.shape[picked.axis], *entries.shape))
    if joined is None or joined.axis != picked.axis:
        return moved
    sizes = [part.shape[joined.axis] for part in joined.parts]
    parts = [part.moved(view, (n, *entries.shape)) for part, n in zip(joined.parts, sizes, strict=True)]
    return replace(moved, joined=Joined(0, tuple(parts)))


def _order(entries: Tensor, own: tuple[int, ...]) -> list[int] | None:
    """The order into which ``entries`` put the axes of each pick; None if they do more."""
    whole = torch.arange(math.prod(own)).reshape(own)
    if entries.dim() != len(own) or entries.numel() != whole.numel():
        return None
    steps = [int(entries.select(axis, 1).flatten()[0]) for axis in range(entries.dim())]
    if sorted(steps) != sorted(whole.stride()) or len(set(steps)) < len(steps):
        return None
    order = [whole.stride().index(step) for step in steps]
    return order if torch.equal(whole.permute(order), entries) else None
