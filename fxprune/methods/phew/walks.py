"""Random walks through the channel graph, thousands at a time, forward or backward, on any network.

A walk is at an entry of a value: at a channel, and at a token or pixel where those differ. Its rules:

* at a contraction, PHEW's probabilities: forward the kernel (j, i) from channel i with
  |W_ji|_1 / sum_j |W_ji|_1, backward with |W_ji|_1 / sum_i |W_ji|_1; then a weight of the kernel with
  |w| / sum |w|;
* at every other op, an entry with probability proportional to the op's own coefficient: data movement and
  sums have one way only, a reduction or an attention-weighted sum several that are equally likely;
* forward, where several ops read an entry (a block and its skip), each is equally likely;
* backward, where several operands of an op lead to an entry (a residual sum, the two factors of a gate or of
  attention), each is equally likely.

On a chain this is PHEW as published, on a residual network its rule of the fair coin, with identity skips
counted as ways too. Ways that lead nowhere (to an output that nothing reads, from a constant) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.methods.phew.kernel_transition import KernelTransition
from fxprune.methods.phew.transitions import CoefficientTransition, Draw, Transition, transition_of
from fxprune.paths.context import EvalContext, unit_operand
from fxprune.paths.program import Half, Step, compile_graph
from fxprune.paths.scaled import Tested
from fxprune.paths.traversal import EdgeWeights, Traversal

__all__ = ["Visits", "Walks"]

NOWHERE = -1


class Visits(NamedTuple):
    """Weights passed: flat indices in each parameter, and the walk that passed them (aligned, by name).

    ``complete``: the ids of the walks that went all the way.
    """

    weights: dict[str, Tensor]
    walks: dict[str, Tensor]
    complete: Tensor


@dataclass
class _Arc:
    """A transition between two values of the network.

    ``name``: the parameter whose weights it passes, if any; ``places``: the flat index in the parameter of
    each weight of the operand, where the two differ. ``leading`` and ``reached``: entries of the source and
    of the target that lie on a way from the network's inputs to its outputs along this arc.
    """

    source: int
    target: int
    transition: Transition
    name: str | None = None
    places: Tensor | None = None
    leading: Tensor | None = None
    reached: Tensor | None = None


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
        self.sources = [
            s.output for s in self.program.steps if isinstance(s.op, ir.Source) and s.op.output.live
        ]
        self.arcs = [arc for step in self.program.steps for arc in self._arcs_of(step)]
        self.on_way = self._restrict_arcs()
        self.arcs_into: dict[int, list[_Arc]] = {}
        self.arcs_from: dict[int, list[_Arc]] = {}
        for arc in self.arcs:
            self.arcs_into.setdefault(arc.target, []).append(arc)
            self.arcs_from.setdefault(arc.source, []).append(arc)
        self.longest = sum(1 for arc in self.arcs if arc.name is not None)

    # -- building ---------------------------------------------------------------------------------------
    def _arcs_of(self, step: Step) -> list[_Arc]:
        """An arc for every live input of an op."""
        op = step.op
        if isinstance(op, ir.Source) or not op.output.live:
            return []
        if isinstance(op, ir.Kernel):
            return [self._kernel_arc(op, step)]
        if step.halves:
            return [_Arc(half.live, step.output, self._factor(half)) for half in step.halves]
        return [
            _Arc(value.index, step.output, self._operand(step, place))
            for place, value in enumerate(op.inputs)
            if value.live
        ]

    def _kernel_arc(self, op: ir.Kernel, step: Step) -> _Arc:
        name, source = op.weight.name, op.inputs[0].index
        sizes = op.weight.operand(self._sizes_of).detach()
        usable = op.weight.operand(self._usable_of).detach() > 0.5
        if op.live_taps is not None:
            usable = usable & op.live_taps
        places = None
        if name is not None and op.weight.view is not None:
            labels = torch.arange(self.graph.kernels[name].shape.numel(), dtype=torch.float64)
            shape = self.graph.kernels[name].shape
            places = op.weight.operand(lambda _: labels.view(shape)).long().flatten()
        transition = KernelTransition(op, sizes, usable, self.layouts[source], step.layout)
        return _Arc(source, step.output, transition, name, places)

    def _sizes_of(self, name: str) -> Tensor:
        if name not in self.sizes:
            return torch.ones(self.graph.kernels[name].shape)
        return self.sizes[name].detach().abs().float().cpu()

    def _usable_of(self, name: str) -> Tensor:
        if name not in self.usable:
            return torch.ones(self.graph.kernels[name].shape)
        return self.usable[name].float().cpu()

    def _operand(self, step: Step, place: int) -> CoefficientTransition:
        """The transition through one input of an op that is linear in all of them."""
        linear = step.linear
        assert linear is not None, "an op that is neither a source nor a product is linear"
        shapes = [self.program.shapes[value.index] for value in step.op.inputs]

        def apply(x: Tensor) -> Tensor:
            tensors = [torch.zeros(shape, dtype=x.dtype) for shape in shapes]
            tensors[place] = x
            return linear(EvalContext(unit_operand, "any"), tensors)

        return transition_of(apply, shapes[place])

    def _factor(self, half: Half) -> CoefficientTransition:
        """The transition through one factor of a product, where the other is present."""

        def apply(x: Tensor) -> Tensor:
            other = torch.ones(half.ones) if half.ones is not None else self._presence[half.other]
            return half.product(x, other.to(x.dtype))

        return transition_of(apply, self.program.shapes[half.live])

    @cached_property
    def _presence(self) -> dict[int, Tensor]:
        """Mark where each value is not Zero in the dense network, for products."""
        cpu = torch.device("cpu")
        edges = EdgeWeights(self.graph, {}, torch.float32, cpu, rescale=False)
        return Traversal(self.program, Tested(cpu), edges).presence()

    def _restrict_arcs(self) -> dict[int, Tensor]:
        """Leave only what lies between the network's inputs and outputs; returns these entries, by value."""
        sizes = {index: torch.Size(shape).numel() for index, shape in self.program.shapes.items()}
        reached = {index: torch.zeros(size, dtype=torch.bool) for index, size in sizes.items()}
        leading = {index: torch.zeros(size, dtype=torch.bool) for index, size in sizes.items()}
        for source in self.sources:
            reached[source][:] = True
        for index, _ in self.program.outputs:
            leading[index][:] = True
        for arc in self.arcs:
            reached[arc.target] |= arc.transition.reached_from(reached[arc.source])
        for arc in reversed(self.arcs):
            leading[arc.source] |= arc.transition.leading_to(leading[arc.target])
        for arc in self.arcs:
            arc.transition.restrict(reached[arc.source], leading[arc.target])
        for arc in self.arcs:
            arc.leading = arc.transition.leading_to(leading[arc.target]) & reached[arc.source]
            arc.reached = arc.transition.reached_from(reached[arc.source]) & leading[arc.target]
        return {index: reached[index] & leading[index] for index in sizes}

    # -- walking ----------------------------------------------------------------------------------------
    def forward(self, ids: Tensor, generator: torch.Generator) -> Visits:
        """Walk from the inputs to the outputs, starting from the input channels in turn."""
        walkers = _Walkers(ids, generator)
        sources = [source for source in self.sources if bool(self.on_way[source].any())]
        for place, source in enumerate(sources):
            mine = (ids % len(sources) == place).nonzero().flatten()
            entries = self.on_way[source].nonzero().flatten()
            walkers.arrive(source, mine, entries[(ids[mine] // len(sources)) % len(entries)])
        ends = {index for index, _ in self.program.outputs}
        for step in self.program.steps:
            here, entries = walkers.leave(step.output)
            if not len(here):
                continue
            arcs = self.arcs_from.get(step.output, [])
            choices = [_entries_of(arc.leading)[entries] for arc in arcs]
            if step.output in ends:
                choices.append(torch.ones(len(entries), dtype=torch.bool))
            taken = walkers.choose(choices, len(entries))
            for number, arc in enumerate(arcs):
                mine = (taken == number).nonzero().flatten()
                walkers.cross(arc, here[mine], entries[mine], is_forward=True)
            if step.output in ends:
                walkers.finish(here[taken == len(arcs)])
        return walkers.visits()

    def backward(self, ids: Tensor, generator: torch.Generator) -> Visits:
        """Walk from the outputs to the inputs, starting from the outputs in turn."""
        walkers = _Walkers(ids, generator)
        ends = [(index, self.on_way[index].nonzero().flatten()) for index, _ in self.program.outputs]
        starts = ids % max(1, sum(len(entries) for _, entries in ends))
        first = 0
        for index, entries in ends:
            mine = ((starts >= first) & (starts < first + len(entries))).nonzero().flatten()
            walkers.arrive(index, mine, entries[starts[mine] - first])
            first += len(entries)
        for step in reversed(self.program.steps):
            here, entries = walkers.leave(step.output)
            if not len(here):
                continue
            if isinstance(step.op, ir.Source):
                walkers.finish(here)
                continue
            arcs = self.arcs_into.get(step.output, [])
            taken = walkers.choose([_entries_of(arc.reached)[entries] for arc in arcs], len(entries))
            for number, arc in enumerate(arcs):
                mine = (taken == number).nonzero().flatten()
                walkers.cross(arc, here[mine], entries[mine], is_forward=False)
        return walkers.visits()


def _entries_of(found: Tensor | None) -> Tensor:
    assert found is not None, "arcs are restricted before anyone walks"
    return found


class _Walkers:
    """The walkers of one batch, by the value that they are at.

    A walker is a place in ``ids``, the numbers of the walks.
    """

    def __init__(self, ids: Tensor, generator: torch.Generator) -> None:
        self.ids, self.generator = ids, generator
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._passed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._is_complete = torch.zeros(len(ids), dtype=torch.bool)

    def draw(self, number: int) -> Tensor:
        return torch.rand(number, generator=self.generator, dtype=torch.float64)

    def arrive(self, value: int, walkers: Tensor, entries: Tensor) -> None:
        """Put walkers at entries of a value; those at ``-1`` are lost."""
        is_there = entries >= 0
        self._waiting.setdefault(value, []).append((walkers[is_there], entries[is_there]))

    def leave(self, value: int) -> tuple[Tensor, Tensor]:
        """Take all walkers from a value, with their entries."""
        groups = self._waiting.pop(value, [])
        if not groups:
            nobody = torch.zeros(0, dtype=torch.int64)
            return nobody, nobody
        return torch.cat([group[0] for group in groups]), torch.cat([group[1] for group in groups])

    def choose(self, choices: Sequence[Tensor], number: int) -> Tensor:
        """Draw one of the open ``choices`` (bool) for each walker; ``NOWHERE`` if none is open."""
        if not choices:
            return torch.full((number,), NOWHERE)
        is_open = torch.stack(list(choices))
        if len(choices) == 1:
            return torch.where(is_open[0], 0, NOWHERE)
        rank = is_open.cumsum(0)
        wanted = (self.draw(number) * rank[-1]).long() + 1
        taken = ((rank == wanted) & is_open).int().argmax(0)
        return taken.where(rank[-1] > 0, NOWHERE)

    def cross(self, arc: _Arc, walkers: Tensor, entries: Tensor, *, is_forward: bool) -> None:
        """Take walkers from one end of an arc to the other, and note the weights that they pass."""
        if not len(walkers):
            return
        go: Callable[[Tensor, Tensor, Draw], tuple[Tensor, Tensor]] = (
            arc.transition.forward if is_forward else arc.transition.backward
        )
        found, weights = go(entries, self.ids[walkers], self.draw)
        if arc.name is not None:
            is_there = found >= 0
            weights = weights[is_there]
            weights = weights if arc.places is None else arc.places[weights]
            self._passed.setdefault(arc.name, []).append((weights, walkers[is_there]))
        self.arrive(arc.target if is_forward else arc.source, walkers, found)

    def finish(self, walkers: Tensor) -> None:
        """Count walks as complete."""
        self._is_complete[walkers] = True

    def visits(self) -> Visits:
        """The weights that complete walks have passed."""
        weights, walks = {}, {}
        for name, groups in self._passed.items():
            weight, walker = (torch.cat(part) for part in zip(*groups, strict=True))
            is_kept = self._is_complete[walker]
            weights[name], walks[name] = weight[is_kept], self.ids[walker[is_kept]]
        return Visits(weights, walks, self.ids[self._is_complete])
