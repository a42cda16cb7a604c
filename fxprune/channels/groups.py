"""Group the channels of a network: the smallest sets that can be removed together.

A group holds output channels (rows) and input channels (columns) of parameters. Removing all of one group,
and nothing else, leaves a network whose tensors are rectangles. Groups do not overlap.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxprune.channels.by_channel import labels_by_weight
from fxprune.channels.components import components
from fxprune.channels.follow import follow
from fxprune.channels.labels import FIXED, Labels, Lines
from fxprune.graph import ChannelGraph, KernelSet

__all__ = ["ChannelSlice", "Groups", "group_channels", "held_groups"]


@dataclass(frozen=True, slots=True)
class ChannelSlice:
    """Slices of one parameter or buffer: the given ``indices`` along ``axis``.

    ``axis`` is "out" or "in" for the output and input channels of a layer's weight, and the number of the
    dimension for all others (biases, norms, tables).
    """

    parameter: str
    axis: str | int
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a graph, numbered from 0.

    ``rows``, ``columns``: parameter -> the number of the group of each of its output and input channels, -1
    for channels that cannot be removed. Output channels are counted as in a value: those of a grouped
    transposed convolution run over its groups first. Input channels run over all groups too. ``numbers`` says
    the same of every label.
    """

    graph: ChannelGraph
    labels: Labels
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    count: int
    numbers: Tensor

    @cached_property
    def families(self) -> Tensor:
        """The family of each group: those that share a parameter's outputs, or a table, are of one family."""
        family = torch.arange(self.count)
        changed = True
        tables = [self.numbers[labels] for labels in self.labels.tables.values()]
        while changed:
            changed = False
            for numbers in (*self.rows.values(), *tables):
                own = torch.unique(numbers[numbers >= 0])
                if len(own) and not bool((family[own] == family[own].min()).all()):
                    old = family[own]
                    family[torch.isin(family, old)] = int(old.min())
                    changed = True
        return family

    def by_weight(self, name: str) -> tuple[Tensor, Tensor]:
        """The group of the output and of the input channel of every kernel, in the parameter's layout."""
        kernels = self.graph.kernels[name]
        by_row, by_column = labels_by_weight(self.rows[name], self.columns[name], kernels)
        one = _first_taps(kernels)
        return by_row[one], by_column[one]

    def kept(self, name: str, alive: Tensor) -> Tensor:
        """The weights of a parameter, in new memory, that stay if only the groups in ``alive`` (bool) do."""
        stays = torch.cat([alive, alive.new_ones(1)])  # -1: what cannot be removed
        kernels = self.graph.kernels[name]
        by_row, by_column = labels_by_weight(stays[self.rows[name]], stays[self.columns[name]], kernels)
        if kernels.groups == 1:  # one row for all, with all its taps: it is then joined many at a time
            rows = (int(kernels.transposed),) if kernels.axes is None else kernels.axes[0]
            first = tuple(slice(0, 1 if axis in rows else None) for axis in range(by_column.dim()))
            by_column = by_column[first].contiguous()
        # Arithmetic on bytes is many times faster than on bits.
        return (by_row.view(torch.uint8) & by_column.view(torch.uint8)).view(torch.bool)

    def members(self, group: int) -> list[ChannelSlice]:
        """The slices that go with a group, by parameter and axis."""
        found = []
        for axis, table in (("out", self.rows), ("in", self.columns)):
            for name, numbers in table.items():
                indices = (numbers == group).nonzero().flatten().tolist()
                if indices:
                    found.append(ChannelSlice(name, axis, tuple(indices)))
        return found


def _first_taps(kernels: KernelSet) -> tuple[slice, ...]:
    """The index of one tap of every kernel."""
    sides = (0, 1) if kernels.axes is None else (*kernels.axes[0], *kernels.axes[1])
    return tuple(slice(None) if axis in sides else slice(0, 1) for axis in range(len(kernels.shape)))


def group_channels(graph: ChannelGraph, *, fixed: Collection[str] = (), whole_heads: bool = False) -> Groups:
    """Return the channel groups of a graph; ``fixed`` parameters keep all their output channels.

    ``whole_heads``: the channels of one attention head are one group. Otherwise the n-th channels of all
    heads are, so that heads keep equally many.
    """
    labels = follow(graph, fixed=fixed, whole_heads=whole_heads)
    tie_lines(labels)
    return _numbered(graph, labels, labels.root)


def held_groups(groups: Groups) -> tuple[Groups, dict[int, str]]:
    """Return the groups that there would be if nothing were fixed, and why some of them cannot go.

    The groups of ``groups`` keep their numbers; those that cannot go follow, each with its reason.
    """
    labels = groups.labels
    edges = torch.cat(labels.edges, 1) if labels.edges else torch.zeros((2, 0), dtype=torch.int64)
    root = components(labels.count, edges[:, (edges != FIXED).all(0)])
    free = _numbered(groups.graph, labels, root)
    held = torch.unique(free.numbers[(groups.numbers < 0) & (free.numbers >= 0)])
    new = torch.full((free.count + 1,), -1)  # the last entry: -1 stays -1
    new[held] = torch.arange(groups.count, groups.count + len(held))
    reasons = dict.fromkeys(range(groups.count, groups.count + len(held)), "meets entries that cannot go")
    for label, reason in reversed(labels.reasons.items()):
        number = int(new[free.numbers[label]])
        if number >= 0:
            reasons[number] = reason

    def numbered(own: Tensor, others: Tensor) -> Tensor:
        return own.where(own >= 0, new[others])

    rows = {name: numbered(own, free.rows[name]) for name, own in groups.rows.items()}
    columns = {name: numbered(own, free.columns[name]) for name, own in groups.columns.items()}
    numbers = numbered(groups.numbers, free.numbers)
    return Groups(groups.graph, labels, rows, columns, groups.count + len(held), numbers), reasons


def _numbered(graph: ChannelGraph, labels: Labels, root: Tensor) -> Groups:
    """Number the groups that hold an output channel, or entries of a table and an input channel."""
    seen = torch.zeros(labels.count, dtype=torch.bool)
    for name, kernels in graph.kernels.items():
        first = labels.rows[name]
        seen[root[first : first + kernels.outputs]] = True
    read = torch.zeros_like(seen)
    for name, kernels in graph.kernels.items():
        first = labels.columns[name]
        read[root[first : first + kernels.inputs]] = True
    for entries in labels.tables.values():
        seen[root[entries]] |= read[root[entries]]
    seen[: FIXED + 1] = False
    number = torch.full((labels.count,), -1)
    number[seen] = torch.arange(int(seen.sum()))
    numbers = number[root]
    rows, columns = {}, {}
    for name, kernels in graph.kernels.items():
        first, second = labels.rows[name], labels.columns[name]
        rows[name] = numbers[first : first + kernels.outputs]
        columns[name] = numbers[second : second + kernels.inputs]
    return Groups(graph, labels, rows, columns, int(seen.sum()), numbers)


def tie_lines(labels: Labels) -> None:
    """Tie labels until the removal of any one group leaves every line equally long, or takes it whole."""
    done = False
    while not done:
        done = True
        for lines in labels.lines:
            vanish = not lines.stay and (lines.partner is None or _vanish_together(labels, lines))
            classes = labels.root[lines.labels]
            while classes.dim() > 1 and not (_is_aligned(classes) if lines.box else _is_even(classes)):
                if vanish and bool((classes == classes[..., :1]).all()):
                    classes = classes[..., 0]  # lines go as a whole: the lines of lines are asked
                    continue
                classes = classes.flatten(0, -2)
                labels.tie(classes, classes[:1])
                done = False
                break


def _vanish_together(labels: Labels, lines: Lines) -> bool:
    """Tie lines to their partners if both can only go as a whole; False if lines go one entry at a time."""
    assert lines.partner is not None
    for own in (lines.labels, lines.partner):
        classes = labels.root[own]
        if not bool((classes == classes[:, :1]).all()):
            return False
    labels.tie(lines.labels[:, 0], lines.partner[:, 0])
    return True


def _is_even(classes: Tensor) -> bool:
    """Whether every class has equally many members in every line."""
    lines = classes.flatten(0, -2).sort(-1).values
    return bool((lines == lines[:1]).all())


def _is_aligned(classes: Tensor) -> bool:
    """Whether all lines have the same classes in the same places."""
    lines = classes.flatten(0, -2)
    return bool((lines == lines[:1]).all())
