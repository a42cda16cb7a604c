"""List the channel groups of a network: what belongs to each, what goes with it, and whether it may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fxprune.channels.cost import count_macs, count_parameters
from fxprune.channels.entries import entry_groups
from fxprune.channels.groups import ChannelSlice, Groups, held_groups

__all__ = ["ChannelGroup", "GroupTable", "list_groups"]


@dataclass(frozen=True)
class ChannelGroup:
    """One channel group.

    ``members``: the slices that go together. ``parameters``: how many numbers go with it alone, biases and
    norms included; ``macs``: how many multiply-adds of one sample. ``reason``: why it cannot go, empty if it
    can.
    """

    id: int
    members: tuple[ChannelSlice, ...]
    parameters: int
    macs: int
    reason: str = ""

    @property
    def removable(self) -> bool:
        """Whether the group can go."""
        return not self.reason

    @property
    def size(self) -> int:
        """The number of output channels in the group, over all layers."""
        return sum(len(member.indices) for member in self.members if member.axis == "out")


@dataclass(frozen=True)
class GroupTable(Sequence[ChannelGroup]):
    """All channel groups of a network, by id; ``print`` shows groups of the same make on one line."""

    groups: tuple[ChannelGroup, ...]

    def __getitem__(self, index: int) -> ChannelGroup:  # type: ignore[override]
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __str__(self) -> str:
        lines = [f"{'ids':<15} {'groups':>6} {'size':>4} {'parameters':>11} {'MACs':>13}  members"]
        kinds: dict[tuple[object, ...], list[ChannelGroup]] = {}
        for group in self.groups:
            make = tuple((member.parameter, member.axis, len(member.indices)) for member in group.members)
            kinds.setdefault((make, group.parameters, group.macs, group.reason), []).append(group)
        for same in kinds.values():
            one = same[0]
            held = f"  stays: {one.reason}" if one.reason else ""
            members = ", ".join(_words(member) for member in one.members)
            lines.append(
                f"{_ranges([group.id for group in same]):<15} {len(same):>6} {one.size:>4} "
                f"{one.parameters:>11,} {one.macs:>13,}  {members}{held}"
            )
        free = sum(group.removable for group in self.groups)
        lines.append(f"{len(self.groups)} groups, {free} of which can go")
        return "\n".join(lines)


def list_groups(
    groups: Groups, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> GroupTable:
    """Return the groups of a graph as a table; ``parameters``, ``buffers``: all of its network, by name."""
    every, reasons = held_groups(groups)
    for table, word in ((groups.rows, "outputs"), (groups.columns, "inputs")):
        for name, numbers in table.items():
            if len(numbers) and bool((numbers == numbers[0]).all()) and int(numbers[0]) >= 0:
                reasons.setdefault(int(numbers[0]), f"it is all {word} of {name}")
    members: list[list[ChannelSlice]] = [[] for _ in range(every.count)]
    everything = torch.ones(every.count, dtype=torch.bool)
    own_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    sizes = count_parameters(every, own_shapes).saved(everything).tolist()
    macs = count_macs(every).saved(everything).tolist()
    for axis, by_name in (("out", every.rows), ("in", every.columns)):
        for name, numbers in by_name.items():
            _append(members, name, axis, numbers)
    shapes = {name: tensor.shape for name, tensor in (*parameters.items(), *buffers.items())}
    for name, axes in entry_groups(every, shapes).items():
        for dimension, numbers in axes.items():
            _append(members, name, dimension, numbers)
    return GroupTable(
        tuple(
            ChannelGroup(number, tuple(own), round(count), round(cost), reasons.get(number, ""))
            for number, (own, count, cost) in enumerate(zip(members, sizes, macs, strict=True))
        )
    )


def _append(members: list[list[ChannelSlice]], name: str, axis: str | int, numbers: Tensor) -> None:
    """Add one slice of a parameter to every group that has indices of it."""
    order = numbers.argsort(stable=True)
    found, counts = torch.unique_consecutive(numbers[order], return_counts=True)
    places, end = order.tolist(), 0
    for group, count in zip(found.tolist(), counts.tolist(), strict=True):
        begin, end = end, end + count
        if group >= 0:
            members[group].append(ChannelSlice(name, axis, tuple(places[begin:end])))


def _words(member: ChannelSlice) -> str:
    axis = member.axis if isinstance(member.axis, str) else f"dim {member.axis}"
    return f"{member.parameter} {axis}" + (f" x{len(member.indices)}" if len(member.indices) > 1 else "")


def _ranges(ids: Sequence[int]) -> str:
    """The numbers as ranges: 0-3, 7."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ids)) if b != a + 1), len(ids)]
    parts = [(ids[low], ids[high - 1]) for low, high in pairwise(starts)]
    words = [f"{a}-{b}" if b > a else f"{a}" for a, b in parts]
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
