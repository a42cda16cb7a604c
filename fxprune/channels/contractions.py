"""Labels through a contraction of two values: attention, gram matrices, low-rank products."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from fxprune.channels.labels import Factor, Heads, Labels, Lines
from fxprune.channels.wholes import Whole
from fxprune.graph import ir

__all__ = ["behind_product", "contraction", "shared_axes", "zero_operands"]

Operand = tuple[ir.Value, Sequence[Factor]]


def contraction(
    labels: Labels, op: ir.Mix, operands: Sequence[Operand], place: str, wholes: list[Whole] | None
) -> list[Factor]:
    """Tie what ``einsum(equation, a, b)`` multiplies, and return the factors of its output.

    Letters that are summed over, and letters that both operands and the output have (heads), must keep the
    same indices on both sides. Unless whole heads go (``wholes`` is None), a head stays while any of its
    channels does, so that a factor over heads and channels asks the other operand for nothing but its
    channels; an entry for a head that meets such is added to ``wholes``.
    """
    whole_heads = wholes is None
    inputs, _, out = op.equation.partition("->")
    letters = inputs.split(",")
    lettered = [
        [_Lettered(tuple(own[axis] for axis in factor.axes), factor.labels, own) for factor in factors]
        for (_, factors), own in zip(operands, letters, strict=True)
    ]
    sizes = [
        dict(zip(own, value.shape, strict=True)) for (value, _), own in zip(operands, letters, strict=True)
    ]
    found: list[Factor] = []
    heads = _Heads(labels, op, lettered, sizes, place)
    for side in (0, 1):
        for factor in lettered[side]:
            if not whole_heads and heads.is_known(factor, lettered[1 - side]):
                continue
            if wholes is not None and _waits(factor, out, sizes[1 - side], lettered[1 - side], place, wholes):
                continue
            reason = _partner(labels, factor, out, sizes[1 - side], lettered[1 - side], whole_heads)
            if reason and (apart := _without(labels, factor, sizes[1 - side])) is not None:
                factor, reason = apart, ""
            if reason:
                labels.fix(factor.labels, f"{place}: {reason}" if place else reason)
                continue
            rest = _output_factor(labels, factor, out, whole_heads)
            if rest is not None:
                found.append(rest)
            own_letters = [letter for letter in factor.letters if letter not in sizes[1 - side]]
            if own_letters and len(factor.letters) > len(own_letters):
                index = operands[side][0].index
                labels.lines.append(Lines(factor.lines(own_letters), index, place))
    return found if whole_heads else [*found, *heads.of_result(found)]


def zero_operands(
    labels: Labels,
    op: ir.Mix,
    factors_of: Callable[[ir.Value], Sequence[Factor]],
    zeros: Collection[int],
) -> Iterator[tuple[ir.Value, list[Factor]]]:
    """Yield the operand of a product that is zero, with the factors of what it is multiplied with there.

    Such is the first state of linear attention, whose entries go with the channels of the keys. Along the
    axes of the result that it has alone, it has labels of its own: what is added to the result ties them.
    ``zeros``: the indices of the constants that are zero.
    """
    inputs, _, out = op.equation.partition("->")
    letters = inputs.split(",")
    for side in (0, 1):
        value, other, own = op.inputs[side], op.inputs[1 - side], letters[side]
        if value.index not in zeros:
            continue
        kept = {axis for axis, letter in enumerate(own) if letter in out and value.shape[axis] > 1}
        # As many with whole heads as without: a graph has the same labels in both cases.
        new = labels.more(math.prod(value.shape[axis] for axis in kept))
        found = _renamed(factors_of(other), letters[1 - side], own, value)
        alone = {axis for axis in kept if own[axis] not in letters[1 - side]}
        if found and alone:
            axes = sorted(alone | (kept & set(found[0].axes)))
            shape = [size if axis in axes else 1 for axis, size in enumerate(value.shape)]
            found.append(Factor(tuple(axes), new[: math.prod(shape)].view(shape)))
        if found:
            yield value, found


def behind_product(
    op: ir.Mix, factors: Sequence[Factor], is_followed: Callable[[ir.Value], bool]
) -> Iterator[tuple[ir.Value, list[Factor]]]:
    """Yield the constants that a product of the ``factors`` takes, with those that they share with it."""
    inputs, _, out = op.equation.partition("->")
    for value, own in zip(op.inputs, inputs.split(","), strict=True):
        found = [] if is_followed(value) else _renamed(factors, out, own, value)
        if found:
            yield value, found


def _renamed(factors: Sequence[Factor], letters: str, others: str, value: ir.Value) -> list[Factor]:
    """Return the factors all of whose axes another operand has as well, along its axes.

    ``letters``, ``others``: the names of the axes of the one and of the other, whose value is ``value``.
    """
    found = []
    for factor in factors:
        names = [letters[axis] for axis in factor.axes]
        axes = [others.find(name) for name in names]
        if any(axis < 0 or value.shape[axis] == 1 for axis in axes):
            continue
        order = sorted(range(len(axes)), key=axes.__getitem__)
        labels = factor.labels.reshape([factor.labels.shape[axis] for axis in factor.axes]).permute(order)
        shape = [1] * len(others)
        for place in order:
            shape[axes[place]] = factor.labels.shape[factor.axes[place]]
        found.append(Factor(tuple(axes[place] for place in order), labels.reshape(shape)))
    return found


def shared_axes(op: ir.Mix) -> list[tuple[int, ...]]:
    """Return, for both operands of a product, the axes that both of them and the result have, as heads."""
    inputs, _, out = op.equation.partition("->")
    letters = inputs.split(",")
    sizes = [dict(zip(own, value.shape, strict=True)) for own, value in zip(letters, op.inputs, strict=True)]
    both = {letter for letter in out if all(side.get(letter, 1) > 1 for side in sizes)}
    return [tuple(axis for axis, letter in enumerate(own) if letter in both) for own in letters]


class _Lettered:
    """A factor whose axes are named by the letters of an equation."""

    def __init__(self, letters: tuple[str, ...], labels: Tensor, own: str) -> None:
        self.letters, self.labels, self.own = letters, labels, own

    def along(self, order: Sequence[str]) -> Tensor:
        """The labels with axes in the given order of letters, size one where it has none."""
        axes = [self.own.index(letter) for letter in order if letter in self.own]
        rest = [axis for axis in range(self.labels.dim()) if axis not in axes]
        labels = (
            self.labels.permute([*axes, *rest]).flatten(len(axes)).amax(-1)
            if rest
            else self.labels.permute(axes)
        )
        for place, letter in enumerate(order):
            if letter not in self.own:
                labels = labels.unsqueeze(place)
        return labels

    def lines(self, last: Sequence[str]) -> Tensor:
        """The labels with the letters of ``last`` along the last axis, together."""
        first = [letter for letter in self.letters if letter not in last]
        return self.along([*first, *last]).flatten(len(first))


class _Heads:
    """The heads of a product of two values: a letter that both have, and the result, beside channels.

    The labels are counted in either case, so that a graph has the same ones with whole heads and without.
    """

    def __init__(
        self,
        labels: Labels,
        op: ir.Mix,
        sides: Sequence[Sequence[_Lettered]],
        sizes: Sequence[dict[str, int]],
        place: str,
    ) -> None:
        self.labels, self.place = labels, place
        self.out = op.equation.partition("->")[2]
        self.letters = [letter for letter in self.out if all(own.get(letter, 1) > 1 for own in sizes)]
        self.sizes = [sizes[0][letter] for letter in self.letters]
        self.new = labels.of_heads(math.prod(self.sizes)) if self.letters else torch.zeros(0)
        found = [self._lines(factor) for own in sides for factor in own if self._has_channels(factor)]
        self.lines = torch.cat(found, -1) if found else None

    def _has_channels(self, factor: _Lettered) -> bool:
        own = set(factor.letters)
        return bool(own & set(self.letters)) and bool(own - set(self.letters))

    def _lines(self, factor: _Lettered) -> Tensor:
        """The labels of a factor, (heads, channels)."""
        rest = [letter for letter in factor.letters if letter not in self.letters]
        by_head = factor.along([*self.letters, *rest]).flatten(len(self.letters))
        return by_head.expand(*self.sizes, -1).flatten(0, -2)

    def is_known(self, factor: _Lettered, others: Sequence[_Lettered]) -> bool:
        """Whether a factor is of heads whose channels the other operand has; they go together then."""
        if not set(factor.letters) <= set(self.letters) or not self.labels.are_heads(factor.labels):
            return False
        lines = [self._lines(other) for other in others if self._has_channels(other)]
        if not lines:
            return False
        one = factor.along(self.letters).expand(self.sizes).flatten()
        self.labels.heads.append(Heads(one, torch.cat(lines, -1), self.place))
        return True

    def of_result(self, found: Sequence[Factor]) -> list[Factor]:
        """The factor of the heads in the result, if no other says which of its heads go."""
        axes = tuple(self.out.index(letter) for letter in self.letters)
        if self.lines is None or any(set(factor.axes) & set(axes) for factor in found):
            return []
        # Heads with the same channels, such as those of all samples, are one.
        _, number = torch.unique(self.lines, dim=0, return_inverse=True)
        one = self.new[number]
        self.labels.heads.append(Heads(one, self.lines, self.place))
        shape = [1] * len(self.out)
        for axis, size in zip(axes, self.sizes, strict=True):
            shape[axis] = size
        return [Factor(axes, one.view(shape))]


def _partner(
    labels: Labels,
    factor: _Lettered,
    out: str,
    sizes: dict[str, int],
    others: Sequence[_Lettered],
    whole_heads: bool,
) -> str:
    """Tie a factor to what it meets in the other operand; return why it is fixed, if it is."""
    shared = [letter for letter in factor.letters if sizes.get(letter, 1) > 1]
    if not shared:
        # Summed over without a partner: each term goes by itself.
        return ""
    summed = [letter for letter in shared if letter not in out]
    if not summed and len(shared) < len(factor.letters) and not whole_heads:
        return ""
    overlapping = [other for other in others if set(other.letters) & set(shared)]
    # Of a state with channels of keys and of values by head, the keys' alone are summed over; where they go
    # in whole heads, as behind a softmax over them, the values' go with them.
    along = [other for other in overlapping if set(other.letters) & set(summed)]
    if along and not whole_heads and not all(_go_in_lines(labels, each, summed) for each in [factor, *along]):
        overlapping = along
    if not overlapping:
        return "multiplied with entries that cannot be removed"
    for other in overlapping:
        order = list(dict.fromkeys((*factor.letters, *other.letters)))
        labels.tie(factor.along(order), other.along(order))
    return ""


def _go_in_lines(labels: Labels, factor: _Lettered, summed: Sequence[str]) -> bool:
    """Whether all entries along the letters that are summed over go together, by the ties that are known."""
    roots = labels.root[factor.lines([letter for letter in factor.letters if letter in summed])]
    return bool((roots == roots[..., :1]).all())


def _without(labels: Labels, factor: _Lettered, sizes: dict[str, int]) -> _Lettered | None:
    """Let entries go with all along the letters that the other operand has, where its own cannot go.

    ``None`` if there are no other letters, as then nothing can go. Such are the outputs of a layer that makes
    a matrix, which reads what cannot go.
    """
    apart = [letter for letter in factor.letters if sizes.get(letter, 1) == 1]
    if not apart or len(apart) == len(factor.letters):
        return None
    first = factor.lines([letter for letter in factor.letters if letter not in apart])
    labels.tie(first, first[..., :1])
    own = [
        place for place, letter in enumerate(factor.own) if letter in factor.letters and letter not in apart
    ]
    return _Lettered(tuple(apart), factor.labels.amax(own, keepdim=True), factor.own)


def _waits(
    factor: _Lettered,
    out: str,
    sizes: dict[str, int],
    others: Sequence[_Lettered],
    place: str,
    wholes: list[Whole],
) -> bool:
    """Whether a factor has one entry for several channels of the other operand, which is noted."""
    shared = [letter for letter in factor.letters if sizes.get(letter, 1) > 1]
    if not shared or any(letter not in out for letter in shared):
        return False
    for other in others:
        if set(factor.letters) < set(other.letters):
            order = list(dict.fromkeys((*factor.letters, *other.letters)))
            reason = "one entry for several channels that may go one by one"
            said = f"{place}: {reason}" if place else reason
            wholes.append(Whole(factor.along(order), other.along(order), said, place))
            return True
    return False


def _output_factor(labels: Labels, factor: _Lettered, out: str, whole_heads: bool) -> Factor | None:
    """The factor of the output: letters that are summed over drop out."""
    left = [letter for letter in factor.letters if letter in out]
    if not left:
        return None
    if len(left) < len(factor.letters):
        if not whole_heads:
            return None
        gone = [letter for letter in factor.letters if letter not in out]
        lines = factor.along([*left, *gone]).flatten(len(left))
        top = lines.amax(-1)
        labels.tie(lines, top.unsqueeze(-1))
    else:
        top = factor.along(left)
    ordered = [letter for letter in out if letter in left]
    top = top.permute([left.index(letter) for letter in ordered])
    for place, letter in enumerate(out):
        if letter not in left:
            top = top.unsqueeze(place)
    return Factor(tuple(out.index(letter) for letter in ordered), top)
