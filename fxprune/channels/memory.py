"""Count the most bytes that activations take at one time, when some channel groups are gone.

Nodes of the captured graph run in their order. A tensor is there from the node that makes it to the last one
that reads it or a view of it; what is written in place is no new tensor. So the bytes at every step are a
sum over tensors, and the peak is the largest sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.channels.cost import Entries, Term
from fxprune.channels.groups import Groups
from fxprune.graph import ChannelGraph, ir
from fxprune.torch_private import DropoutNd, pytree

__all__ = ["LiveRanges", "Peak", "Storage", "count_memory", "live_ranges"]


@dataclass(frozen=True)
class Storage:
    """The memory of one activation: ``value`` in the graph, if it is known, and ``bytes`` for one sample."""

    value: ir.Value | None
    bytes: float


@dataclass(frozen=True)
class LiveRanges:
    """``storages`` of a network, and for every step that may be the peak the numbers of those that are alive.

    Steps whose storages are all alive at some other step are left out.
    """

    storages: tuple[Storage, ...]
    steps: tuple[frozenset[int], ...]


@dataclass(frozen=True, eq=False)
class Peak:
    """Hold the peak of several sums as a cost: ``sizes`` (bytes) of B tensors, ``alive`` (S, B) at S steps.

    It answers the questions that a :class:`fxprune.channels.cost.Cost` does.
    """

    groups: int
    sizes: tuple[Term, ...]
    alive: Tensor

    def left(self, staying: Tensor) -> float:
        """Return the peak of the network in which only the groups marked in ``staying`` (bool) are left."""
        return float(self._steps(staying).max())

    def saved(self, staying: Tensor) -> Tensor:
        """Return by how much the removal of each group alone lowers the peak (float64)."""
        steps = self._steps(staying)
        lowered = steps[:, None] - self._by_step(staying, torch.arange(len(steps)))
        return steps.max() - lowered.amax(0)

    def towards(self, staying: Tensor, level: float) -> Tensor:
        """Return what each group takes from all steps that are above ``level``, added up.

        Two steps may share the peak, and no single group lower both: so the peak alone tells too little.
        """
        steps = self._steps(staying)
        high = (steps > level).nonzero().flatten()
        return self._by_step(staying, high).sum(0)

    @cached_property
    def whole(self) -> float:
        """The peak of the whole network."""
        return self.left(torch.ones(self.groups, dtype=torch.bool))

    def _steps(self, staying: Tensor) -> Tensor:
        """The bytes at every step (S,)."""
        stays = torch.cat([staying, staying.new_ones(1)]).double()
        return self.alive @ torch.tensor([size.left(stays) for size in self.sizes], dtype=torch.float64)

    def _by_step(self, staying: Tensor, steps: Tensor) -> Tensor:
        """The bytes that go with each group at some steps (len(steps), groups)."""
        stays = torch.cat([staying, staying.new_ones(1)]).double()
        alive = self.alive[steps]
        found = torch.zeros(len(steps), self.groups, dtype=torch.float64)
        for place in alive.any(0).nonzero().flatten().tolist():
            if self.sizes[place].parts:
                found += alive[:, place, None] * self.sizes[place].saved(stays)[: self.groups]
        return found


def live_ranges(gm: fx.GraphModule, graph: ChannelGraph) -> LiveRanges:
    """Find the storages of the activations of a captured network, and which are alive together.

    The network's inputs count until they are last read; parameters and buffers do not count, nor does memory
    that a node uses inside of itself. Dropout is taken to return its input, as in evaluation.

    >>> from fxprune.capture import capture
    >>> from fxprune.lowering import lower
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gm = capture(net, torch.ones(5, 8))
    >>> found = live_ranges(gm, lower(gm))
    >>> [[found.storages[number].bytes for number in sorted(step)] for step in found.steps]
    [[32.0, 16.0], [16.0, 16.0], [16.0, 8.0]]
    """
    storages: list[Storage] = []
    numbers: dict[int, int] = {}  # address of the memory that a shape stands for -> place in `storages`
    held: dict[fx.Node, frozenset[int]] = {}
    constant: set[fx.Node] = set()
    born: list[int] = []
    for time, node in enumerate(gm.graph.nodes):
        if node.op == "get_attr" or (node.op != "placeholder" and set(node.all_input_nodes) <= constant):
            constant.add(node)
        if node.op in ("get_attr", "output"):
            held[node] = frozenset()
            continue
        source = _same_memory(gm, node)
        if source is not None:
            held[node] = held[source]
            continue
        own = set()
        for value, tensor in _results(node, graph):
            address = _address(tensor)
            if address not in numbers:
                if any(_address(t) == address for n in node.all_input_nodes for t in _tensors(n)):
                    continue  # a view of a parameter or a buffer
                share = 1 if node in constant else graph.samples
                numbers[address] = len(storages)
                storages.append(Storage(value, tensor.numel() * tensor.element_size() / share))
                born.append(time)
            own.add(numbers[address])
        held[node] = frozenset(own)
    return LiveRanges(tuple(storages), _steps(gm, held, born))


def count_memory(ranges: LiveRanges, groups: Groups) -> Peak:
    """Return the cost that is the most bytes of activations at one time, for one sample."""
    alive = torch.zeros(len(ranges.steps), len(ranges.storages), dtype=torch.float64)
    for row, step in enumerate(ranges.steps):
        alive[row, sorted(step)] = 1.0
    return Peak(groups.count, tuple(_size(groups, storage) for storage in ranges.storages), alive)


def _size(groups: Groups, storage: Storage) -> Term:
    """The bytes of one storage: a unit times the number of indices that are left along each factor."""
    factors = () if storage.value is None else groups.labels.values.get(storage.value.index, ())
    unit, parts = storage.bytes, []
    for factor in factors:
        numbers = groups.numbers[factor.labels].flatten()
        rows = numbers.where(numbers >= 0, groups.count)
        ones = torch.ones(len(rows), dtype=torch.float64)
        parts.append(Entries(rows, torch.full_like(rows, groups.count), ones))
        unit /= len(rows)
    return Term(unit, tuple(parts))


def _steps(
    gm: fx.GraphModule, held: dict[fx.Node, frozenset[int]], born: Sequence[int]
) -> tuple[frozenset[int], ...]:
    """The storages that are alive at each step; none of these sets is part of another."""
    last = list(born)
    for time, node in enumerate(gm.graph.nodes):
        for used in node.all_input_nodes:
            for number in held[used]:
                last[number] = time
    every = [
        frozenset(n for n, start in enumerate(born) if start <= time <= last[n])
        for time in range(len(gm.graph.nodes))
    ]
    # A set that is part of another one is part of a neighbour, as every storage lives without a gap.
    return tuple(
        step
        for time, step in enumerate(every)
        if not (time and step <= every[time - 1])
        and not any(step < later for later in every[time + 1 : time + 2])
        and step
    )


def _results(node: fx.Node, graph: ChannelGraph) -> Iterator[tuple[ir.Value | None, Tensor]]:
    """Every tensor that a node yields, as shapes stand for it, with its value in the graph."""
    known = graph.results.get(node.name)
    for path, tensor in pytree.tree_flatten_with_path(node.meta.get("val"))[0]:
        if isinstance(tensor, Tensor):
            value = known
            for key in path:
                value = _member(value, key)
            fits = isinstance(value, ir.Value) and value.shape == tuple(tensor.shape)
            yield value if fits else None, tensor


def _member(value: Any, key: Any) -> Any:
    """The member of a nested result under a key of a path; ``None`` where there is none."""
    name = getattr(key, "idx", getattr(key, "key", getattr(key, "name", None)))
    if isinstance(value, dict):
        return value.get(name)
    if isinstance(value, (list, tuple)) and isinstance(name, int) and name < len(value):
        return value[name]
    return None


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _same_memory(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the node whose memory a dropout hands on, or a view that was captured as a copy."""
    if node.op == "call_module":
        drops = isinstance(gm.get_submodule(str(node.target)), DropoutNd)
        return node.all_input_nodes[0] if drops else None
    if node.target in (nn.functional.dropout, torch.dropout):
        return node.all_input_nodes[0]
    sizes = [tensor.untyped_storage().nbytes() for tensor in _tensors(node)]
    near = [n for n in node.all_input_nodes if [t.untyped_storage().nbytes() for t in _tensors(n)] == sizes]
    if (
        len(sizes) != 1
        or not near
        or any(_address(_tensors(n)[0]) == _address(_tensors(node)[0]) for n in near)
    ):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), _stand_in)
    call: Any = node.target
    if node.op == "call_method":
        call, args = getattr(args[0], str(node.target)), args[1:]
    try:
        again = call(*args, **kwargs)
    except RuntimeError:  # no shape without values: then it is no view
        return None
    if not isinstance(again, Tensor):
        return None
    return next((n for n in near if _address(_tensors(n)[0]) == _address(again)), None)


def _stand_in(node: fx.Node) -> Any:
    """The tensors that stand for a node's results, under other names."""
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, node.meta.get("val"))
