"""Random walks through the channel graph, thousands at a time, forward or backward, on any network.

In: a lowered network and the size |w| of every weight. Out: the weights that each complete walk passed.

A walk is at an entry of a value (a channel; at a token or pixel where those are told apart). Its rules:

* at a kernel op, PHEW's probabilities: forward the kernel (j, i) from channel i with |W_ji|_1 / sum_j
|W_ji|_1,
  backward with |W_ji|_1 / sum_i |W_ji|_1; then a weight inside the kernel with |w| / sum |w|;
* at every other op, an edge with probability proportional to the op's own coefficient: data movement and
  sums have one way only, a reduction or an attention-weighted sum several alike;
* forward, where several ops read an entry (a block and its skip), each is as likely as the others;
* backward, where an op has several operands that lead to an entry (a residual sum, the two factors of a gate
  or of attention), each is as likely as the others.

On a chain this is PHEW as published, on a residual network its rule of the fair coin, with identity skips
counted as ways too. Edges that lead nowhere (an output that is thrown away, a constant) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.methods.phew.kernel_transition import KernelLink
from fxprune.methods.phew.transitions import EdgeLink, Link, edges_of
from fxprune.paths.context import EvalContext, unit_operand
from fxprune.paths.program import Half, Step, compile_graph
from fxprune.paths.scaled import Tested
from fxprune.paths.traversal import EdgeWeights, Traversal

__all__ = ["Visits", "Walks"]

NOWHERE = -1


class Visits(NamedTuple):
    """Weights passed: flat indices in each parameter, and the walk that passed them (aligned, by name).

    ``complete``: which walks (by their ids) went all the way.
    """

    weights: dict[str, Tensor]
    walks: dict[str, Tensor]
    complete: Tensor


class _Way(NamedTuple):
    """A link at its place: the value it comes from, the value it leads to, the parameter that it passes."""

    source: int
    target: int
    link: Link
    name: str | None
    places: Tensor | None


class Walks:
    """The walks of one network; build once, walk often.

    Args:
        graph: the lowered network.
        sizes: |w| of every parameter (of its shape); a parameter that is missing counts as ones.
        usable: weights that walks may pass (bool), by name; all where missing. Taps that only see padding are
            left out.
    """

    def __init__(
        self,
        graph: ir.ChannelGraph,
        sizes: Mapping[str, Tensor],
        usable: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.program = compile_graph(graph, "channel")
        self.sizes, self.usable = sizes, usable or {}
        self.graph = graph
        self.layouts = {step.output: step.layout for step in self.program.steps}
        self.counts = {index: _size(shape) for index, shape in self.program.shapes.items()}
        self.sources = [
            s.output for s in self.program.steps if isinstance(s.op, ir.Source) and s.op.output.live
        ]
        self.ways = [way for step in self.program.steps for way in self._ways(step)]
        self._prune()
        self.into: dict[int, list[_Way]] = {}
        self.out_of: dict[int, list[_Way]] = {}
        for way in self.ways:
            self.into.setdefault(way.target, []).append(way)
            self.out_of.setdefault(way.source, []).append(way)
        self.longest = sum(1 for way in self.ways if way.name is not None)

    # -- building -------------------------------------------------------------------------------------------
    def _ways(self, step: Step) -> list[_Way]:
        op = step.op
        if isinstance(op, ir.Source) or not op.output.live:
            return []
        if isinstance(op, ir.Kernel):
            return [self._kernel(op, step)]
        if step.halves:
            return [_Way(half.live, step.output, self._half(half), None, None) for half in step.halves]
        return [
            _Way(value.index, step.output, self._operand(step, place), None, None)
            for place, value in enumerate(op.inputs)
            if value.live
        ]

    def _kernel(self, op: ir.Kernel, step: Step) -> _Way:
        name, source = op.weight.name, op.inputs[0].index
        size = op.weight.operand(self._size).detach()
        usable = op.weight.operand(self._usable).detach() > 0.5
        if op.live_taps is not None:
            usable = usable & op.live_taps
        link = KernelLink(op, size, usable, self.layouts[source], step.layout)
        index = None
        if name is not None and op.weight.view is not None:
            labels = torch.arange(self.graph.kernels[name].shape.numel(), dtype=torch.float64)
            index = op.weight.operand(lambda _: labels.view(self.graph.kernels[name].shape)).long().flatten()
        return _Way(source, step.output, link, name, index)

    def _size(self, name: str) -> Tensor:
        if name not in self.sizes:
            return torch.ones(self.graph.kernels[name].shape)
        return self.sizes[name].detach().abs().float().cpu()

    def _usable(self, name: str) -> Tensor:
        if name not in self.usable:
            return torch.ones(self.graph.kernels[name].shape)
        return self.usable[name].float().cpu()

    def _operand(self, step: Step, place: int) -> EdgeLink:
        linear = step.linear
        assert linear is not None
        shapes = [self.program.shapes[value.index] for value in step.op.inputs]

        def apply(x: Tensor) -> Tensor:
            tensors = [torch.zeros(shape, dtype=x.dtype) for shape in shapes]
            tensors[place] = x
            return linear(EvalContext(unit_operand, "any"), tensors)

        return edges_of(apply, shapes[place])

    def _half(self, half: Half) -> EdgeLink:
        def apply(x: Tensor) -> Tensor:
            there = torch.ones(half.ones) if half.ones is not None else self._present[half.other]
            return half.product(x, there.to(x.dtype))

        return edges_of(apply, self.program.shapes[half.live])

    @cached_property
    def _present(self) -> dict[int, Tensor]:
        """Where each value is not Zero in the dense network, for products."""
        cpu = torch.device("cpu")
        edges = EdgeWeights(self.graph, {}, torch.float32, cpu, rescale=False)
        return Traversal(self.program, Tested(cpu), edges).presence()

    def _prune(self) -> None:
        """Leaves only what lies between the network's inputs and its outputs."""
        fed = {i: torch.zeros(n, dtype=torch.bool) for i, n in self.counts.items()}
        feeding = {i: torch.zeros(n, dtype=torch.bool) for i, n in self.counts.items()}
        for source in self.sources:
            fed[source][:] = True
        for index, _ in self.program.outputs:
            feeding[index][:] = True
        for way in self.ways:
            fed[way.target] |= way.link.spread(fed[way.source])
        for way in reversed(self.ways):
            feeding[way.source] |= way.link.gather(feeding[way.target])
        for way in self.ways:
            way.link.within(fed[way.source], feeding[way.target])
        self.fed, self.feeding = fed, feeding
        self.leads = {id(way): way.link.gather(feeding[way.target]) & fed[way.source] for way in self.ways}
        self.reached = {id(way): way.link.spread(fed[way.source]) & feeding[way.target] for way in self.ways}

    # -- walking --------------------------------------------------------------------------------------------
    def forward(self, ids: Tensor, generator: torch.Generator) -> Visits:
        """Walks from the inputs on, starting from their channels in turn."""
        trip = _Trip(ids, generator)
        sources = [s for s in self.sources if bool((self.fed[s] & self.feeding[s]).any())]
        ends = {index for index, _ in self.program.outputs}
        for place, source in enumerate(sources):
            mine = (ids % len(sources) == place).nonzero().flatten()
            open_entries = (self.fed[source] & self.feeding[source]).nonzero().flatten()
            trip.arrive(source, mine, open_entries[(ids[mine] // len(sources)) % len(open_entries)])
        for step in self.program.steps:
            walkers, entries = trip.at(step.output)
            if not len(walkers):
                continue
            ways = self.out_of.get(step.output, [])
            doors = [self.leads[id(way)][entries] for way in ways]
            if step.output in ends:
                doors.append(torch.ones(len(entries), dtype=torch.bool))
            taken = trip.choose(doors, len(entries))
            for number, way in enumerate(ways):
                mine = (taken == number).nonzero().flatten()
                if len(mine):
                    trip.cross(way, walkers[mine], way.link.forward, entries[mine], ids)
            if step.output in ends:
                trip.finish(walkers[taken == len(ways)])
        return trip.visits()

    def backward(self, ids: Tensor, generator: torch.Generator) -> Visits:
        """Walks from the outputs back, starting from them in turn."""
        trip = _Trip(ids, generator)
        ends = [(i, (self.fed[i] & self.feeding[i]).nonzero().flatten()) for i, _ in self.program.outputs]
        starts = ids % max(1, sum(len(entries) for _, entries in ends))
        first = 0
        for index, entries in ends:
            mine = ((starts >= first) & (starts < first + len(entries))).nonzero().flatten()
            trip.arrive(index, mine, entries[starts[mine] - first])
            first += len(entries)
        for step in reversed(self.program.steps):
            walkers, entries = trip.at(step.output)
            if not len(walkers):
                continue
            if isinstance(step.op, ir.Source):
                trip.finish(walkers)
                continue
            ways = self.into.get(step.output, [])
            taken = trip.choose([self.reached[id(way)][entries] for way in ways], len(entries))
            for number, way in enumerate(ways):
                mine = (taken == number).nonzero().flatten()
                if len(mine):
                    trip.cross(way, walkers[mine], way.link.backward, entries[mine], ids, back=True)
        return trip.visits()


class _Trip:
    """The walkers of one batch, by the value that they are at."""

    def __init__(self, ids: Tensor, generator: torch.Generator) -> None:
        self.ids, self.generator = ids, generator
        self.waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.passed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.done = torch.zeros(len(ids), dtype=torch.bool)

    def draw(self, number: int) -> Tensor:
        return torch.rand(number, generator=self.generator, dtype=torch.float64)

    def arrive(self, value: int, walkers: Tensor, entries: Tensor) -> None:
        there = entries >= 0
        self.waiting.setdefault(value, []).append((walkers[there], entries[there]))

    def at(self, value: int) -> tuple[Tensor, Tensor]:
        groups = self.waiting.pop(value, [])
        if not groups:
            nobody = torch.zeros(0, dtype=torch.int64)
            return nobody, nobody
        return torch.cat([g[0] for g in groups]), torch.cat([g[1] for g in groups])

    def choose(self, doors: list[Tensor], number: int) -> Tensor:
        """One of the open doors for everyone, each as likely; ``NOWHERE`` if none is open."""
        if not doors:
            return torch.full((number,), NOWHERE)
        opened = torch.stack(doors)
        if len(doors) == 1:
            return torch.where(opened[0], 0, NOWHERE)
        rank = opened.cumsum(0)
        wanted = (self.draw(number) * rank[-1]).long() + 1
        taken = ((rank == wanted) & opened).int().argmax(0)
        return taken.where(rank[-1] > 0, NOWHERE)

    def cross(
        self,
        way: _Way,
        walkers: Tensor,
        go: Callable[[Tensor, Tensor, Callable[[int], Tensor]], tuple[Tensor, Tensor]],
        entries: Tensor,
        ids: Tensor,
        back: bool = False,
    ) -> None:
        found, weights = go(entries, ids[walkers], self.draw)
        if way.name is not None:
            there = found >= 0
            weights = weights[there]
            weights = weights if way.places is None else way.places[weights]
            self.passed.setdefault(way.name, []).append((weights, walkers[there]))
        self.arrive(way.source if back else way.target, walkers, found)

    def finish(self, walkers: Tensor) -> None:
        self.done[walkers] = True

    def visits(self) -> Visits:
        """What the complete walks passed."""
        weights, walks = {}, {}
        for name, groups in self.passed.items():
            weight, walker = (torch.cat(part) for part in zip(*groups, strict=True))
            kept = self.done[walker]
            weights[name], walks[name] = weight[kept], self.ids[walker[kept]]
        return Visits(weights, walks, self.ids[self.done])


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
