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

from fxprune.channels.follow import follow, labels_by_weight
from fxprune.channels.labels import FIXED, Labels
from fxprune.graph import ChannelGraph

__all__ = ["Channel", "Groups", "group_channels"]


@dataclass(frozen=True)
class Channel:
    """Slices of one parameter: the given ``indices`` along its output or input channels (``axis``)."""

    parameter: str
    axis: str
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a graph, numbered from 0.

    ``rows``, ``columns``: parameter -> the number of the group of each of its output and input channels, -1
    for channels that cannot be removed. Output channels are counted as in a value: those of a grouped
    transposed convolution run over its groups first. Input channels run over all groups too.
    """

    graph: ChannelGraph
    labels: Labels
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    count: int

    @cached_property
    def families(self) -> Tensor:
        """The family of each group: groups that share a parameter's output channels are of one family."""
        family = torch.arange(self.count)
        changed = True
        while changed:
            changed = False
            for numbers in self.rows.values():
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
        one = (slice(None), slice(None), *[slice(0, 1)] * (by_row.dim() - 2))
        return by_row[one], by_column[one]

    def kept(self, name: str, alive: Tensor) -> Tensor:
        """The weights of a parameter that stay when only the groups marked in ``alive`` (bool) do."""
        stays = torch.cat([alive, alive.new_ones(1)])  # -1: what cannot be removed
        by_row, by_column = self.by_weight(name)
        return (stays[by_row] & stays[by_column]).expand(self.graph.kernels[name].shape)

    def members(self, group: int) -> list[Channel]:
        """The slices that go with a group, by parameter and axis."""
        found = []
        for axis, table in (("out", self.rows), ("in", self.columns)):
            for name, numbers in table.items():
                indices = (numbers == group).nonzero().flatten().tolist()
                if indices:
                    found.append(Channel(name, axis, tuple(indices)))
        return found


def group_channels(graph: ChannelGraph, *, fixed: Collection[str] = (), whole_heads: bool = False) -> Groups:
    """Return the channel groups of a graph; ``fixed`` parameters keep all their output channels.

    ``whole_heads``: the channels of one attention head are one group. Otherwise the n-th channels of all
    heads are, so that heads keep equally many.
    """
    labels = follow(graph, fixed=fixed, whole_heads=whole_heads)
    tie_lines(labels)
    root = labels.root
    seen = torch.zeros(labels.count, dtype=torch.bool)
    for name, kernels in graph.kernels.items():
        first = labels.rows[name]
        seen[root[first : first + kernels.out_space.size]] = True
    seen[: FIXED + 1] = False
    number = torch.full((labels.count,), -1)
    number[seen] = torch.arange(int(seen.sum()))
    rows, columns = {}, {}
    for name, kernels in graph.kernels.items():
        first, second = labels.rows[name], labels.columns[name]
        rows[name] = number[root[first : first + kernels.out_space.size]]
        columns[name] = number[root[second : second + kernels.in_space.size]]
    return Groups(graph, labels, rows, columns, int(seen.sum()))


def tie_lines(labels: Labels) -> None:
    """Tie labels until the removal of any one group leaves every line equally long, or takes it whole."""
    done = False
    while not done:
        done = True
        for lines in labels.lines:
            classes = labels.root[lines.labels]
            while classes.dim() > 1 and not _is_even(classes):
                if bool((classes == classes[..., :1]).all()):
                    classes = classes[..., 0]  # lines go as a whole: the lines of lines are asked
                    continue
                classes = classes.flatten(0, -2)
                labels.tie(classes, classes[:1])
                done = False
                break


def _is_even(classes: Tensor) -> bool:
    """Whether every class has equally many members in every line."""
    lines = classes.flatten(0, -2).sort(-1).values
    return bool((lines == lines[:1]).all())
