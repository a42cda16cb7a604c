"""Decide which channels go, and what that leaves of every value and parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fxprune.channels.by_channel import any_by_channel
from fxprune.channels.contractions import shared_axes
from fxprune.channels.follow import follow
from fxprune.channels.labels import FIRST, FIXED, Labels, Lines, Sides
from fxprune.graph import ChannelGraph, ir
from fxprune.graph.params import AxisUse
from fxprune.paths.used import Used

__all__ = ["Cut", "UnevenCut"]


class UnevenCut(Exception):
    """Raised where the entries that are left of a tensor make no rectangle; ``labels`` are its labels."""

    def __init__(self, reason: str, labels: Tensor) -> None:
        super().__init__(reason)
        self.labels = labels


class Cut:
    """The set of labels that go: whole groups only, and fewer with every call of ``give_back``.

    ``used``: by parameter, the rows and columns with a weight on some path. A group can go if it has none of
    these. ``nonzero``: marks the weights of a parameter that are not zero, or may grow (bool). ``held``: for
    every group that was given back, the reason. ``multiples``: labels, of which a multiple of a number
    must be left, and who asks for it.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        labels: Labels,
        used: Used,
        nonzero: Callable[[str], Tensor],
        multiples: Iterable[tuple[Tensor, int, str]] = (),
    ) -> None:
        self.graph, self.labels, self.nonzero = graph, labels, nonzero
        self._sides = {id(graph.ops[sides.op]): sides for sides in labels.sides}
        self.held: dict[int, str] = {}
        self._heads: Tensor | None = None
        self._multiples = tuple(multiples)
        alive = torch.zeros(labels.count, dtype=torch.bool)
        for name, kernels in graph.kernels.items():
            rows = labels.rows[name] + torch.arange(kernels.outputs)
            columns = labels.columns[name] + torch.arange(kernels.inputs)
            for labelled, marks in zip((rows, columns), used[name], strict=True):
                alive[labelled[marks.cpu()]] = True
        makers = torch.zeros_like(alive)
        for sides in labels.sides:
            # Of layers that make constants no path tells: what the next of them reads, counts.
            if sides.name is not None and not graph.ops[sides.op].inputs[0].live:
                outputs, inputs = any_by_channel(nonzero(sides.name), graph.kernels[sides.name])
                alive[labels.columns[sides.name] + inputs.nonzero().flatten()] = True
                makers[labels.rows[sides.name] + outputs.nonzero().flatten()] = True
        root = labels.root
        living = torch.zeros(labels.count, dtype=torch.bool)
        living[root[alive]] = True
        self.lives = living.clone()  # by root
        self.lives[FIXED] = False  # what is fixed has a reason of its own
        living[root[:FIRST]] = True
        living[FIXED] = True
        self.gone = ~living  # by root
        self.dead = ~alive & ~makers
        self._follow_heads()
        self._keep_one_of_each()
        self._even_out()

    def sides_of(self, op: ir.Kernel) -> Sides:
        """Return the labels of a contraction's rows and columns."""
        return self._sides[id(op)]

    def is_gone(self, labels: Tensor) -> Tensor:
        """Mark the labels that go (bool, of their shape)."""
        return self.gone[self.labels.root[labels]]

    def give_back(self, labels: Tensor, reason: str) -> bool:
        """Keep the groups of ``labels``, and what must then stay as well; False if they were kept already."""
        if not self._revive(labels, reason):
            return False
        self._even_out()
        return True

    # -- what keeps tensors rectangular -----------------------------------------------------------------
    def _keep_one_of_each(self) -> None:
        """Keep one channel where all outputs or inputs of a parameter, or a factor of a product, would go."""
        for sides in self.labels.sides:
            for labels in (sides.rows, sides.columns):
                if len(labels) and bool(self.is_gone(labels).all()):
                    self.give_back(labels[:1], f"{sides.name}: one channel is left")
        for op in self.graph.ops:
            for value in op.inputs if isinstance(op, ir.Mix) else ():
                for factor in self.labels.values.get(value.index, ()):
                    labels = factor.labels.flatten()
                    if bool(self.is_gone(labels).all()):
                        self.give_back(labels[:1], f"{op.layer or op.node}: one channel is left")

    def _even_out(self) -> None:
        changed = True
        while changed:
            revived = [self._even_lines(lines) for lines in self.labels.lines]
            revived += [self._round_up(*one) for one in self._multiples]
            changed = any(revived) or self._agree_on_heads() or self._follow_heads()

    def _follow_heads(self) -> bool:
        """Keep the labels of heads that have channels left, and some channels of heads that must stay."""
        changed = False
        for heads in self.labels.heads:
            left = ~self.is_gone(heads.each)
            some, stays = left.any(-1), ~self.is_gone(heads.one)
            changed |= self._revive(heads.one[some], f"{heads.place}: a head with channels that are left")
            back = heads.each[stays & ~some][:, : max(1, int(left.sum(-1).max()))]
            changed |= self._revive(back, f"{heads.place}: a head that is used elsewhere")
        return changed

    def _round_up(self, labels: Tensor, multiple: int, place: str) -> bool:
        """Keep some more of the labels, if their number is no multiple."""
        gone = self.is_gone(labels)
        missing = int((~gone).sum()) % multiple > 0
        back = labels[gone][: int(missing)]  # one at a time: it may bring others with it
        return self._revive(back, f"{place}: it takes a multiple of {multiple} channels")

    def _agree_on_heads(self) -> bool:
        """Keep channels of a head that has none left in one place, where it has some in another."""
        partial = [(lines, place) for lines, place in self._head_lines if self._loses_some(lines)]
        if not partial:
            return False
        if self._heads is None:
            self._heads = follow(self.graph, whole_heads=True).root
        needed = torch.zeros(self.labels.count, dtype=torch.bool)
        needed[self._heads[~self.gone[self.labels.root]]] = True
        found = False
        for lines, place in partial:
            left, heads = ~self.is_gone(lines), self._heads[lines]
            one = (heads == heads[:, :1]).all(-1) & needed[heads[:, 0]] & ~left.any(-1)
            back = lines[one][:, : int(left.sum(-1).max())]
            found |= self._revive(back, f"{place}: a head that is used elsewhere")
        return found

    @cached_property
    def _head_lines(self) -> list[tuple[Tensor, str]]:
        """The labels of the operands of products, (heads, channels of a head), and who reads them."""
        found = []
        for op in self.graph.ops:
            if isinstance(op, ir.Mix) and op.equation:
                for value, heads in zip(op.inputs, shared_axes(op), strict=True):
                    for factor in self.labels.values.get(value.index, ()):
                        own = [axis for axis in factor.axes if axis in heads]
                        if own and len(own) < len(factor.axes):
                            lines = factor.labels.movedim(own, tuple(range(len(own))))
                            sizes = [factor.labels.shape[axis] for axis in own]
                            found.append((lines.reshape(math.prod(sizes), -1), op.layer or op.node))
        return found

    def _loses_some(self, lines: Tensor) -> bool:
        """Whether some lines go as a whole, and some do not."""
        alive = (~self.is_gone(lines)).any(-1)
        return bool(alive.any()) and not bool(alive.all())

    def _even_lines(self, every: Lines) -> bool:
        """Keep as many in every line as in the longest; a line may go as a whole, if that is a slice."""
        labels, place = every.labels, every.place
        left = ~self.is_gone(labels)
        if every.box:
            gap = _product_of_slices(left) & ~left
            reason = f"{place}: the same channels in every part"
            return bool(gap.any()) and self._revive(labels[gap], reason)
        alive = left.any(-1)
        if every.partner is not None:
            alive |= (~self.is_gone(every.partner)).any(-1)
        whole = torch.ones_like(alive) if every.stay else _product_of_slices(alive)
        counts = left.sum(-1)
        most = int(counts.max()) if counts.numel() else 0
        short = whole & (counts < most)
        if not bool(short.any()):
            return False
        lines, kept = labels[short], left[short]
        missing = most - counts[short]
        rank = (~kept).long().cumsum(-1)
        revived = lines[(~kept) & (rank <= missing[:, None])]
        return self._revive(revived, f"{place}: equally many channels in every part")

    def _revive(self, labels: Tensor, reason: str) -> bool:
        """Keep the groups of ``labels``; False if they were kept already."""
        roots = torch.unique(self.labels.root[labels.flatten()])
        roots = roots[self.gone[roots]]
        self.gone[roots] = False
        for root in roots.tolist():
            self.held.setdefault(root, reason)
        return bool(len(roots))

    # -- what is left ------------------------------------------------------------------------------------
    def mask(self, value: ir.Value) -> list[tuple[tuple[int, ...], Tensor]]:
        """The kept entries of a value: by factor its axes, and a mask of the value's rank (bool)."""
        return [(f.axes, ~self.is_gone(f.labels)) for f in self.labels.values.get(value.index, ())]

    def touches(self, value: ir.Value) -> bool:
        """Whether anything of a value goes."""
        return any(not bool(mask.all()) for _, mask in self.mask(value))

    def shrinks(self, value: ir.Value | None, axis: int | None = None) -> bool:
        """Whether a value gets smaller, along ``axis`` if one is given; False where there is no value."""
        if value is None or not self.touches(value):
            return False
        return axis is None or self.shape(value)[axis] != value.shape[axis]

    def labels_of(self, value: ir.Value) -> Tensor:
        """All labels of a value."""
        factors = self.labels.values.get(value.index, ())
        return (
            torch.cat([f.labels.flatten() for f in factors]) if factors else torch.zeros(0, dtype=torch.int64)
        )

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape of a value when its channels are gone."""
        sizes = list(value.shape)
        for axes, mask in self.mask(value):
            dense = mask.reshape([mask.shape[axis] for axis in axes])
            for axis, size in zip(axes, self._box(dense, value), strict=True):
                sizes[axis] = min(sizes[axis], size)
        return tuple(sizes)

    def kept_along(self, value: ir.Value, axis: int) -> Tensor | None:
        """Mark the indices of one axis that stay in any line (bool); return ``None`` if they all do."""
        kept = torch.ones(value.shape[axis], dtype=torch.bool)
        for axes, mask in self.mask(value):
            if axis in axes:
                others = [other for other in range(mask.dim()) if other != axis]
                kept &= mask.any(dim=others) if others else mask
        return None if bool(kept.all()) else kept

    def kept_by_use(self, value: ir.Value, use: AxisUse, size: int) -> tuple[Tensor, Tensor]:
        """Mark the entries of a parameter's axis that a value still reads, and those that it read before.

        Both are bool, of ``size``.
        """
        shape = [value.shape[axis] for axis in use.axes]
        stays = torch.ones(shape, dtype=torch.bool)
        for axes, mask in self.mask(value):
            common = [axis for axis in axes if axis in use.axes]
            if not common:
                continue
            others = [axis for axis in range(mask.dim()) if axis not in common]
            part = mask.any(dim=others) if others else mask
            if others and not bool(
                ((mask.any(dim=others, keepdim=True) & mask.any(dim=common, keepdim=True)) == mask).all()
            ):
                raise UnevenCut(
                    "a parameter meets different channels in different lines", self.labels_of(value)
                )
            ordered = sorted(common)
            part = part.permute([ordered.index(axis) for axis in sorted(common, key=use.axes.index)])
            for place, axis in enumerate(use.axes):
                if axis not in common:
                    part = part.unsqueeze(place)
            stays &= part
        flat = stays.flatten()
        whole = torch.ones(size, dtype=torch.bool)
        if use.index is None:
            return flat if len(flat) == size else whole, whole
        index = torch.tensor(use.index)
        met = index >= 0
        if not bool((index[met] < size).all()):
            return whole, whole
        kept, seen = torch.zeros(2, size, dtype=torch.bool)
        seen[index[met]] = True
        kept[index[met & flat]] = True
        return kept, seen

    def _box(self, mask: Tensor, value: ir.Value) -> Sequence[int]:
        """The sizes of a box with the kept entries in their order."""
        sizes = []
        for axis in range(mask.dim()):
            others = [other for other in range(mask.dim()) if other != axis]
            alive = mask.any(dim=others) if others else mask
            mask = mask.index_select(axis, alive.nonzero().flatten())
        counts = mask.sum(-1)
        if mask.numel() and not bool((counts == counts.flatten()[0]).all()):
            raise UnevenCut("different numbers of channels in different lines", self.labels_of(value))
        sizes = list(mask.shape)
        if mask.numel():
            sizes[-1] = int(counts.flatten()[0])
        return sizes


def _product_of_slices(alive: Tensor) -> Tensor:
    """Mark all lines in the smallest box of slices that holds the marked ones."""
    whole = torch.ones_like(alive)
    for axis in range(alive.dim()):
        others = [other for other in range(alive.dim()) if other != axis]
        whole &= alive.any(dim=others, keepdim=True) if others else alive
    return whole
