"""The contract of a method: ``Method.find`` takes a ``Problem`` and returns ``Masks`` that meet its budget.

A method that also changes the weights it keeps returns masks and weights.

A method that only gives each weight a score uses ``from_scores``, which does rounds, regrowth and selection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fxprune.arguments import takes
from fxprune.graph.ir import ChannelGraph
from fxprune.scoring.distributed import agree
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.channel_granularity import fitted
from fxprune.sparsity.granularity import WEIGHT, Granularity
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import DensityFunction, OneShot, Schedule, resolve
from fxprune.sparsity.select import select
from fxprune.sparsity.sharded import kept_overall, select_sharded, summed

_T = TypeVar("_T")

Scores = dict[str, torch.Tensor]
"""Parameter name -> a finite score for each of its weights, higher = keep."""

Weights = dict[str, torch.Tensor]
"""Parameter name -> new values for its weights; those that the masks prune are not looked at."""

Found = Masks | tuple[Masks, Weights]
"""The result of a method: masks, or masks and the new values of kept weights."""


class Progress(Protocol):
    """Wraps an iterable of ``total`` steps, and may draw a progress bar.

    The description may be a function, which is asked for the words of the moment after each step.
    """

    def __call__(self, steps: Iterable[_T], description: str | Callable[[], str], total: int) -> Iterable[_T]:
        """``steps``, unchanged."""


def silent(steps: Iterable[_T], description: str | Callable[[], str], total: int) -> Iterable[_T]:
    """The progress that shows nothing."""
    return steps


@dataclass(frozen=True)
class Problem:
    """The task of a method: find masks within ``masks`` that keep exactly ``budget``.

    ``model``: a private copy of the captured network, which a method may run and must leave as it found it
    (the network itself where `Method.reads_only` allows that).
    ``graph``: its lowered form. ``device``: where the model runs. ``weights``: the prunable parameters'
    values, detached, on ``device``, or on the host, to keep gradients, scores and masks there and leave the
    device to the model. ``masks``: where to start (all kept, unless the model was pruned before). ``data``: a
    pair (x, y), a mapping, inputs alone, or an iterable of batches; ``loss_fn``: ``loss_fn(output, target)``,
    or ``loss_fn(model, batch)`` for mapping batches. ``granularity``: it reads parameters as the graph does,
    and ties channels. ``generator``: the only source of randomness, on the CPU. ``schedule``: the caller's
    wish, ``None`` for the method's own. ``micro_batch``: at most so many samples run at a time, gradients add
    up. ``invert``: keep the lowest scores instead of the highest. ``group``: processes that score together,
    each on data of its own, and end with the same masks. ``shards``: the processes over which ``fully_shard``
    has split the parameters of ``model``; ``weights`` and ``masks`` are then this one's rows, and the budget
    is that of the whole. ``history``: where a method notes how it went, as columns of equal length.
    ``fixed``: excluded tables, such as embeddings, whose channels stay.
    """

    model: torch.nn.Module
    graph: ChannelGraph
    weights: dict[str, torch.Tensor]
    masks: Masks
    budget: Budget
    data: Any = None
    loss_fn: Callable[..., torch.Tensor] | None = None
    granularity: Granularity = WEIGHT
    schedule: str | Schedule | DensityFunction | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    micro_batch: int | None = None
    invert: bool = False
    group: ProcessGroup | None = None
    shards: ProcessGroup | None = None
    history: dict[str, list[float]] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch!r}: expected a number of samples, at least 1")
        shapes = {name: tuple(weight.shape) for name, weight in self.model.named_parameters()}
        grain = fitted(self.granularity, self.graph, self.weights, shapes, self.model, self.fixed)
        object.__setattr__(self, "granularity", grain)


NEEDS = frozenset({"data", "graph"})
"""What a method may say that it cannot run without."""


@dataclass(frozen=True)
class Method:
    """A pruning method: ``find`` is all it must have.

    ``needs``: what a method cannot run without: "data"; "graph", if it asks about paths. ``labels``: whether
    it asks for a loss, so that data are pairs, or the caller has a loss. ``scored``: whether it ranks scores
    by ``from_scores`` or ``prune_in_rounds``; False where it builds masks directly. ``shards``: what ``find``
    takes where parameters are split over processes: "rows", those of its process, as ``Problem.shards`` says;
    "shapes", whole parameters on the meta device, for it needs no values, and finds the same masks in every
    process; "no", nothing: it needs whole parameters. ``updates``: whether ``find`` returns masks and
    weights, new values for any of the prunable parameters. ``reads_only``: whether ``find`` neither runs the
    model nor writes into it or ``Problem.weights``: then they may be the caller's own, which saves a copy.
    ``summary``: one line. ``paper``: authors, year and arXiv id. Methods outside the package are such objects
    too, passed as ``method=``.
    """

    name: str
    find: Callable[[Problem], Found]
    needs: frozenset[str] = frozenset()
    summary: str = ""
    paper: str = ""
    scored: bool = True
    shards: Literal["rows", "shapes", "no"] = "no"
    updates: bool = False
    reads_only: bool = False
    labels: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.needs, str):
            raise TypeError(f"method {self.name!r}: needs={self.needs!r}, expected a set: {{{self.needs!r}}}")
        unknown = sorted(set(self.needs) - NEEDS)
        if unknown:
            raise ValueError(f"method {self.name!r}: needs={unknown[0]!r}, expected 'data' or 'graph'")
        if not callable(self.find):
            raise TypeError(f"method {self.name!r}: find={self.find!r}, expected a function of a Problem")
        if not takes(self.find, 1):
            signature = inspect.signature(self.find)
            raise TypeError(f"method {self.name!r}: find is called with a Problem, got one of {signature}")
        object.__setattr__(self, "needs", frozenset(self.needs))

    def check(self, *, data: object) -> None:
        """``ValueError`` if the method needs ``data`` and there is none."""
        if "data" in self.needs and data is None:
            form = "a pair (x, y)" if self.labels else "inputs"
            raise ValueError(f"method {self.name!r} needs data=..., {form} or an iterable of batches")

    def masks(self, problem: Problem) -> Masks:
        """Return the masks that ``find`` finds; ``ValueError`` if it returns weights with them."""
        found = self.find(problem)
        if isinstance(found, tuple):
            raise ValueError(
                f"method {self.name!r} returns new weights with its masks, and only masks can be used here; "
                "take it as the method of fxprune.apply"
            )
        return found


Criterion = Callable[[Problem, Masks], Scores]
"""``criterion(problem, masks)``: the scores of all weights when ``masks`` are in place."""


def from_scores(
    criterion: Criterion, *, schedule: Schedule | None = None, regrow: bool = False, name: str = ""
) -> Callable[[Problem], Masks]:
    """A method's ``find`` that scores and selects, in the rounds of ``schedule`` (one by default).

    With ``regrow`` a weight pruned in one round may come back in a later one (FORCE); without it, masks only
    shrink. ``name`` is what errors call the method.

    >>> smallest_first = Method("smallest", from_scores(lambda problem, masks: {
    ...     name: -weight.abs() for name, weight in problem.weights.items()}))
    """
    own = OneShot() if schedule is None else schedule
    label = name or getattr(criterion, "__name__", "method")
    _check_criterion(criterion, label)

    def find(problem: Problem) -> Masks:
        return prune_in_rounds(problem, criterion, schedule=own, regrow=regrow, name=label)

    return find


def _check_criterion(criterion: object, label: str) -> None:
    """``TypeError`` for what cannot be called with a problem and masks."""
    if not callable(criterion):
        raise TypeError(f"method {label!r}: criterion={criterion!r}, expected a function of (problem, masks)")
    try:
        inspect.signature(criterion).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"method {label!r}: its criterion is called with (problem, masks): {error}; take both"
        ) from error


def by_rows(find: Callable[[Problem], Masks]) -> Callable[[Problem], Masks]:
    """Let ``find`` score channel groups by the output channels in them, without the input channels.

    For criteria that score an output channel as a whole, and give all its weights this score.
    """

    def find_by_rows(problem: Problem) -> Masks:
        grain = problem.granularity
        if isinstance(grain, ChannelGroups):
            grain = replace(grain, options=replace(grain.options, sides="rows"))
        return find(replace(problem, granularity=grain))

    return find_by_rows


def by_family(find: Callable[[Problem], Masks]) -> Callable[[Problem], Masks]:
    """Let ``find`` compare channel groups of a kind by scores relative to their family, by default.

    For criteria whose scores have another scale in every layer, such as ``|w|``. Under any other scope groups
    compete within their family alone, or by what they cost.
    """

    def find_by_family(problem: Problem) -> Masks:
        grain = problem.granularity
        if isinstance(grain, ChannelGroups):
            options = grain.options
            if options.normalize == "method" and options.scope == "isomorphic":
                grain = replace(grain, options=replace(options, normalize="family"))
        return find(replace(problem, granularity=grain))

    return find_by_family


def prune_in_rounds(
    problem: Problem, criterion: Criterion, *, schedule: Schedule, regrow: bool, name: str
) -> Masks:
    """Scores and selects once per round, down to ``problem.budget``, and never beyond ``problem.masks``.

    Rounds that would keep more than the granularity has room for (a pattern such as 2:4 keeps at most half)
    keep as much as it has. Errors: ``ValueError`` for scores that do not fit or are not finite, for a budget
    the granularity cannot meet, and for a schedule whose density rises although pruned weights stay pruned.
    """
    masks = dict(problem.masks)
    for budget in round_budgets(problem, schedule=schedule, regrow=regrow, name=name):
        within = problem.masks if regrow else masks
        before = _versions(problem.weights)
        scores = criterion(problem, masks)
        if problem.data is None and before != (after := _versions(problem.weights)):
            # A network that runs on data may write to its own weights.
            changed = next(label for label in before if before[label] != after[label])
            raise ValueError(
                f"method {name!r}: its criterion wrote to problem.weights[{changed!r}], which the result"
                " would have; work on copies: w.abs(), not w.abs_()"
            )
        if not isinstance(scores, Mapping):
            raise TypeError(
                f"method {name!r}: its criterion returned a {type(scores).__name__}, expected a dict of"
                " parameter name -> tensor of scores, as problem.weights has them"
            )
        if problem.invert:
            scores = {label: -score for label, score in scores.items()}
        masks = select_within(problem, scores, budget, within, name)
    if problem.group is not None and problem.shards is None:
        agree(masks, problem.group)
    return masks


def _versions(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Tell how often each weight was written to; tensors of inference mode do not count that."""
    return {name: 0 if weight.is_inference() else weight._version for name, weight in weights.items()}


def round_budgets(problem: Problem, *, schedule: Schedule, regrow: bool, name: str) -> Iterator[Budget]:
    """The budget of each round, with progress shown; none where the masks meet the final one already.

    Errors: those of ``prune_in_rounds`` that do not concern scores.
    """
    plan = resolve(problem.schedule, schedule)
    start = kept_overall(problem.masks, problem.shards)
    _check_room(problem, start)
    before = sum(start.values())
    grain = problem.granularity
    weighed = isinstance(grain, ChannelGroups) and grain.options.of != "weights"
    if problem.budget.total == before and not weighed:
        return
    for t in problem.progress(range(1, plan.rounds + 1), name, plan.rounds):
        budget = _round_budget(problem.budget, plan, t, start)
        if budget.total > before and not regrow:
            raise ValueError(
                f"schedule: {before} weights before round {t}, {budget.total} after; it must not rise"
            )
        before = budget.total
        yield budget


def select_within(problem: Problem, scores: Scores, budget: Budget, within: Masks, name: str) -> Masks:
    """The masks of the highest ``scores`` within ``within``, as ``problem`` wants weights to be pruned."""
    return choose(problem, scores, budget.capped(_room(problem, within)), within, name)


def fixed_magnitudes(problem: Problem, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """|w| of the graph's parameters that are not to be pruned, beside ``problem.weights`` on their device.

    They are dense, but paths do not go through zeros. Weights on the meta device, of a model that is split,
    say nothing of where values are: then they are on the device of the problem.
    """
    weight = next(iter(problem.weights.values()), None)
    device = problem.device if weight is None or weight.is_meta else weight.device
    return {
        name: problem.model.get_parameter(name).detach().abs().to(device, dtype)
        for name in problem.graph.kernels
        if name not in problem.weights
    }


def noise(problem: Problem, name: str) -> torch.Tensor:
    """U(0, 1) for every weight of a parameter, or of this process's rows of it, on the CPU.

    A seed means the same on any device and for any number of processes: a parameter is drawn in full.
    """
    if problem.shards is None:
        return torch.rand(problem.masks[name].shape, generator=problem.generator)
    whole = torch.rand(tuple(problem.model.get_parameter(name).shape), generator=problem.generator)
    rows = -(-len(whole) // dist.get_world_size(problem.shards))
    first = rows * dist.get_rank(problem.shards)
    return whole[first : first + rows].clone()


def choose(problem: Problem, scores: Scores, budget: Budget, within: Masks, name: str) -> Masks:
    """The masks of the highest scores under the problem's granularity, over all shards."""
    granularity = problem.granularity
    if problem.shards is None:
        return select(scores, budget, within=within, granularity=granularity, method=name)
    return select_sharded(scores, budget, problem.shards, within=within, granularity=granularity, method=name)


def _room(problem: Problem, masks: Masks) -> dict[str, int]:
    """The largest number of weights that may be kept in each parameter, over all shards."""
    own = problem.granularity.room(masks)
    if problem.shards is None:
        return own
    return dict(zip(own, summed(list(own.values()), problem.shards), strict=True))


def _round_budget(final: Budget, plan: Schedule, t: int, start: dict[str, int]) -> Budget:
    """Return the budget after round ``t``; the last is the final budget, whatever the schedule says."""
    if t == plan.rounds:
        return final
    return final.towards(lambda target: plan.density(t, target), start)


def _check_room(problem: Problem, start: dict[str, int]) -> None:
    room = start if problem.granularity == WEIGHT else _room(problem, problem.masks)
    asked = problem.budget.layers or {"the model": problem.budget.total}
    left = room if problem.budget.layers else {"the model": sum(room.values())}
    sizes = (
        problem.budget.sizes if problem.budget.layers else {"the model": sum(problem.budget.sizes.values())}
    )
    for where, number in asked.items():
        if number > left[where]:
            raise ValueError(
                f"granularity {problem.granularity} has room for {left[where]} weights in {where}, "
                f"{number} are to be kept: ask for a higher sparsity, {1 - left[where] / sizes[where]:.3g}"
                " or more"
            )
