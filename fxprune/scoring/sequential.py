"""Solve the layers of a network one after another, each from the inputs that it has on the data.

A solver gets a :class:`Layer` and returns its mask and its new weights. Data flows through the captured graph
once, node by node; one layer's moments are in memory at a time, and the values between the nodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fxprune.scoring.contract import Problem, Weights
from fxprune.scoring.data import batches as read_batches
from fxprune.scoring.distributed import average, gathered
from fxprune.scoring.moments import Geometry, Part, Products, Watch
from fxprune.scoring.solved import SolvedLayers
from fxprune.scoring.walk import Arguments, Stage, arguments_of, quiet, stages
from fxprune.sparsity.masks import Masks

__all__ = ["Layer", "Matrix", "solve_layers"]


@dataclass(frozen=True)
class Matrix:
    """A part of a parameter with inputs of its own: a stack of matrices.

    ``positions``: places in the flattened parameter, (parts, inputs, outputs). ``moments``: (parts, inputs,
    inputs), the sums of products of ``rows`` vectors of inputs that are not zero, of ``total``; ``sums`` of
    these, (1, parts, inputs). ``taps``: inputs come in runs of so many taps of one channel. Of several
    processes, moments, sums and ``total`` are means.
    Beside a dense twin: ``cross``, the sums of products of inputs and the twin's inputs, and ``sums`` of the
    one and the other, (2, parts, inputs).
    """

    positions: Tensor
    moments: Tensor
    taps: int = 1
    cross: Tensor | None = None
    sums: Tensor | None = None
    total: float = 0
    rows: int = 0


@dataclass(frozen=True)
class Layer:
    """A parameter with its matrices, as a solver sees it.

    ``weight``: its values, in float32 or wider, and contiguous, however the parameter lies in memory.
    ``mask``: what may be kept. ``matrices``: disjoint.
    """

    name: str
    weight: Tensor
    mask: Tensor
    matrices: list[Matrix] = field(default_factory=list)

    @cached_property
    def unseen(self) -> Tensor:
        """The places in the flattened parameter whose inputs no product showed, or were all zero."""
        if sum(matrix.positions.numel() for matrix in self.matrices) == self.weight.numel():
            return torch.empty(0, dtype=torch.int64, device=self.weight.device)
        seen = torch.zeros(self.weight.numel(), dtype=torch.bool, device=self.weight.device)
        for matrix in self.matrices:
            seen[matrix.positions.flatten()] = True
        return (~seen).nonzero().flatten()


Solver = Callable[[Layer], tuple[Tensor, Tensor]]
"""Returns the mask and the new values of a layer, in the shape of its weight."""

Passed = Callable[[Stage, Stage], None]


def solve_layers(
    problem: Problem,
    solver: Solver,
    *,
    batches: int | None,
    propagate: bool,
    method: str,
    start: Weights | None = None,
    silent: bool = False,
    unseen: str = "pruned by magnitude",
    twin: nn.Module | None = None,
    passed: Passed | None = None,
    solved: SolvedLayers | None = None,
    biases: Weights | None = None,
) -> tuple[Masks, Weights]:
    """Solve every prunable layer in the order in which the network computes.

    Args:
        problem: whose model runs, in evaluation mode; it is as it was afterwards.
        solver: called once for each parameter; one that several nodes read is solved at the last of them, on
            the inputs of all.
        batches: the number of batches of ``problem.data``.
        propagate: whether a layer's inputs are those that the solved layers before it give.
        method: for messages.
        start: weights that the network begins with, by name; its own where there are none.
        silent: whether to leave the warnings out.
        unseen: for a warning, what the solver does with weights without inputs.
        twin: the same network, dense; it runs beside, and layers get its inputs too.
        passed: called at every node, when the layers in it are solved, with the node of the network and that
            of its twin.
        solved: layers of a run before, which are taken as they are; new ones are added.
        biases: a solver that finds new biases with its layers puts them in here, by name; they are kept with
            their layers, and in place of the old ones where weights are.

    Returns:
        Masks and new weights, on the device of ``problem.weights``.

    Raises ``ValueError`` for inputs of a layer that are not finite. Warns of layers with fewer inputs than
    weights of an output, and of weights whose inputs no product showed.
    """
    some = read_batches(problem, batches, method)
    if solved is not None:
        solved.begin(some)
    calls = arguments_of(problem, some, method)
    run = _Run(problem, solver, propagate, method, solved, {} if biases is None else biases)
    with quiet(problem.model, method), run.restored(start or {}):
        plan = _reading_plan(problem, calls, run.weights)
        run.walk(plan, calls, twin, passed)
    if not silent:
        run.warn(unseen)
    return {n: run.masks[n] for n in problem.weights}, {n: run.found[n] for n in problem.weights}


class _Run:
    """The state of a walk: what was read of layers that are still to be solved, and what was found."""

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        propagate: bool,
        method: str,
        solved: SolvedLayers | None,
        biases: Weights,
    ) -> None:
        self.problem, self.solver, self.propagate, self.method = problem, solver, propagate, method
        self.biases = biases
        self.solved, self.known = solved, frozenset[str]() if solved is None else solved.names
        self.weights = {name: problem.model.get_parameter(name) for name in problem.weights}
        self.watches: dict[str, Watch] = {}
        self.masks: Masks = {}
        self.found: Weights = {}
        self.before: Weights = {}
        self.few: list[tuple[str, int, int]] = []
        self.hidden: list[str] = []
        self.at = "start"

    @contextmanager
    def restored(self, start: Weights) -> Iterator[None]:
        """Put ``start`` in place; put the weights back that the model had."""
        try:
            for name, values in start.items():
                self._put(name, values)
            yield
        finally:
            with torch.no_grad():
                for name, values in self.before.items():
                    self.problem.model.get_parameter(name).copy_(values)

    def walk(
        self,
        plan: Mapping[int, list[str]],
        calls: Sequence[Arguments],
        twin: nn.Module | None,
        passed: Passed | None,
    ) -> None:
        """Go through the nodes; ``plan`` says which weights each of them reads."""
        last = {name: index for index, names in plan.items() for name in names}
        number = len(self.weights)
        steps = iter(self.problem.progress(range(number), lambda: f"{self.method}: {self.at}", number))
        beside = None if twin is None else stages(twin, calls)
        for index, stage in enumerate(stages(self.problem.model, calls)):
            other = None if beside is None else next(beside)
            for name in plan.get(index, []):
                if name not in self.known:
                    self.read(stage, name, other, twin)
                if last[name] == index:
                    next(steps, None)
                    self.solve(name)
            if passed is not None and other is not None:
                passed(stage, other)
            stage.advance()
            if other is not None:
                other.advance()
        for name in [name for name in self.weights if name not in last]:
            next(steps, None)
            self.solve(name)
        next(steps, None)

    def read(self, stage: Stage, name: str, other: Stage | None, twin: nn.Module | None) -> None:
        """Add what a weight reads at a node, and at the same node of the twin."""
        self.at = name
        watch = self.watches.setdefault(name, Watch({name: self.weights[name]}))
        for piece in range(stage.count):
            if other is not None and twin is not None:
                watch.twin = iter(_inputs_of({name: twin.get_parameter(name)}, other, piece))
            with watch.products():
                stage.run(piece)

    def solve(self, name: str) -> None:
        """Solve a layer from what was read of it, and put its weights in place."""
        self.at = name
        if self.solved is not None and name in self.known:
            mask, new, biases = self.solved.load(name)
            self.biases |= biases
            self._found(name, mask, new, biases)
            return
        watch = self.watches.pop(name, Watch({name: self.weights[name]}))
        parts = _united(watch.parts[name], self.problem.group)
        parameter = self.weights[name]
        layer = self._layer(name, parts)
        old = set(self.biases)
        mask, values = self.solver(layer)
        biases = {bias: values for bias, values in self.biases.items() if bias not in old}
        new = values.to(parameter.dtype)
        if not bool(torch.isfinite(new[mask]).all()):
            raise ValueError(
                f"method {self.method!r}: new weights of {name!r} are not finite; ask for more damp"
            )
        if self.solved is not None:
            self.solved.save(name, mask, new, biases)
        self._found(name, mask, new, biases)

    def _found(self, name: str, mask: Tensor, new: Tensor, biases: Weights) -> None:
        home = self.problem.weights[name].device
        self.masks[name] = mask.to(home)
        self.found[name] = torch.empty_like(self.weights[name].detach(), device=home).copy_(new)
        if self.propagate:
            for one, values in {name: new, **biases}.items():
                self._put(one, values)

    def _put(self, name: str, values: Tensor) -> None:
        parameter = self.problem.model.get_parameter(name)
        self.before.setdefault(name, parameter.detach().clone())
        with torch.no_grad():
            parameter.copy_(values)

    def _layer(self, name: str, parts: Mapping[Geometry, Part]) -> Layer:
        weight, mask = self.weights[name].detach(), self.problem.masks[name].contiguous()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
        if not bool(torch.isfinite(wide).all()):
            raise ValueError(
                f"method {self.method!r}: weights of {name!r} are NaN or infinite; load the model anew, "
                "or take a wider dtype"
            )
        taken = torch.zeros(weight.numel(), dtype=torch.bool)
        matrices = []
        for geometry, part in parts.items():
            assert part.moments is not None
            positions, moments = geometry.positions(weight), part.moments
            if bool(taken[positions].any()):
                continue  # read in another way before: an output has one Hessian
            taken[positions.flatten()] = True
            diagonal = moments.diagonal(dim1=-2, dim2=-1)
            if not bool(torch.isfinite(diagonal).all()):
                raise ValueError(
                    f"method {self.method!r}: the inputs of {name!r} are NaN or infinite; look at the layers "
                    "before it, or take a wider dtype"
                )
            live = (diagonal != 0).any(-1)
            if part.rows < moments.shape[-1]:
                self.few.append((name, part.rows, moments.shape[-1]))
            self._note(name, positions, live.cpu())
            if bool(live.any()):
                where = live.to(positions.device)
                own = positions[where].to(weight.device)
                cross = None if part.cross is None else part.cross[live]
                sums = None if part.sums is None else part.sums[:, live]
                matrices.append(Matrix(own, moments[live], geometry.taps, cross, sums, part.total, part.rows))
        if not bool(taken.all()):
            share = int((~taken).sum())
            slices = (~taken).view(len(weight), -1).all(1).nonzero().flatten().tolist()
            whole = share == len(slices) * weight[0].numel() and len(slices) < len(weight)
            self.hidden += [f"{name}[{index}]" for index in slices] if whole else [name]
        return Layer(name, wide, mask.to(wide.device), matrices)

    def _note(self, name: str, positions: Tensor, live: Tensor) -> None:
        if not bool(live.all()):
            dead = (~live).nonzero().flatten().tolist()
            self.hidden += [f"{name}[{index}]" for index in dead] if len(live) > 1 else [name]

    def warn(self, unseen: str) -> None:
        """Say where the data was too little, and where no inputs were seen."""
        if self.few:
            name, rows, inputs = min(self.few, key=lambda one: one[1] / one[2])
            warnings.warn(
                f"method {self.method!r}: {len(self.few)} layers have fewer inputs from data than weights in "
                f"an output; {name!r} has {rows} for {inputs}, so that its Hessian has rank {rows} at most; "
                "give more data",
                stacklevel=4,
            )
        if self.hidden:
            rest = f" and {len(self.hidden) - 8} more" if len(self.hidden) > 8 else ""
            warnings.warn(
                f"method {self.method!r}: no inputs are seen of {', '.join(self.hidden[:8])}{rest}; they are "
                f"{unseen}",
                stacklevel=4,
            )


def _inputs_of(weights: Mapping[str, Tensor], stage: Stage, piece: int) -> list[list[Tensor]]:
    """The inputs of every product with a weight at a node, in order."""
    found: list[list[Tensor]] = []
    with Products(weights, lambda name, geometry, inputs: found.append(inputs())):
        stage.run(piece)
    return found


def _reading_plan(
    problem: Problem, calls: Sequence[Arguments], weights: Mapping[str, nn.Parameter]
) -> dict[int, list[str]]:
    """For every node, by number, the weights that it multiplies with, in order: from one run of all data."""
    plan: dict[int, list[str]] = {}
    names = problem.weights
    for index, stage in enumerate(stages(problem.model, calls)):
        seen: dict[str, None] = {}
        with Products(weights, lambda name, *rest, seen=seen: seen.setdefault(name)):
            stage.advance()
            if stage.is_model:
                for piece in range(stage.count):
                    stage.run(piece)
        plan[index] = [name for name in seen if name in names]
    if problem.group is not None:
        for other in gathered(plan, problem.group):
            for index, read in other.items():
                plan[index] = list(dict.fromkeys([*plan.get(index, []), *read]))
        plan = {index: sorted(read) for index, read in plan.items()}
    return {index: read for index, read in plan.items() if read}


def _united(parts: dict[Geometry, Part], group: ProcessGroup | None) -> dict[Geometry, Part]:
    """The parts with the moments of all processes; in the same order in each."""
    if group is None:
        return parts
    every: dict[Geometry, tuple[tuple[int, ...], str, bool]] = {}
    own = {
        geometry: (tuple(p.moments.shape), str(p.moments.dtype), p.cross is not None)
        for geometry, p in parts.items()
        if p.moments is not None
    }
    for other in gathered(own, group):
        every |= other
    united = {}
    for geometry in sorted(every, key=repr):
        shape, dtype, has_twin = every[geometry]
        part = parts.get(geometry, Part(geometry))
        if part.moments is None:
            part.moments = torch.zeros(shape, dtype=getattr(torch, dtype.rpartition(".")[2]))
            part.sums = part.moments.new_zeros(1 + has_twin, *shape[:2])
            part.cross = torch.zeros_like(part.moments) if has_twin else None
        assert part.sums is not None
        average([part.moments, part.sums, *([] if part.cross is None else [part.cross])], group)
        numbers = torch.tensor([part.rows, part.total], dtype=torch.float64)
        average([numbers], group)
        rows, total = numbers.tolist()
        part.rows, part.total = round(rows * dist.get_world_size(group)), total or 1
        united[geometry] = part
    return united
