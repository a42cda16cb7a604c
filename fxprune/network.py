"""A captured network, the problem that methods solve for it, and masks put into the form that was asked for.

``apply`` and ``Pruner`` share these; each decides when masks are found, and how often.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from fxprune.capture import CaptureError, capture_own
from fxprune.capture.errors import users_level
from fxprune.capture.inputs import example_inputs_for
from fxprune.graph import ChannelGraph
from fxprune.latency.cost import latency_cost
from fxprune.lowering import graph_of_run, hidden_layers, lower, matrices_outside
from fxprune.methods import Method, Problem, Weights, redraw
from fxprune.metrics import listed as listed_sizes
from fxprune.progress import Display
from fxprune.request import Request, excluded_parameters, resolve_device
from fxprune.rewrite import direct_reads, finalize, put_masks, read
from fxprune.rewrite.masking.computed import computed_weights, settled
from fxprune.rewrite.masking.copying import duplicate
from fxprune.rewrite.masking.parameters import check, unwrap
from fxprune.rewrite.masking.torch_pruning import masks_of_torch
from fxprune.scoring.contract import Progress
from fxprune.scoring.outliers import outlier_budget
from fxprune.sparsity.budget import plan
from fxprune.sparsity.granularity import WEIGHT, Channel, in_unit
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks, is_subset, kept, validate
from fxprune.sparsity.sharded import kept_overall

OUTSIDE = 0.1
"""The share of matrix weights that may stay out of reach without a warning."""


@dataclass(frozen=True)
class Asker:
    """Say of what will find masks its ``name``, what it ``needs``, and whether it prunes computed weights."""

    name: str
    needs: Collection[str]
    prunes_computed: bool = True


@dataclass(frozen=True)
class Network:
    """Hold a model in the forms that pruning needs.

    ``given``: as the caller passed it. ``source``: without masks. ``captured`` and ``graph``: ``source``
    captured, and lowered. ``before``: the masks that ``given`` has. ``settled``: ``source`` with computed
    weights (``weight_norm``) as plain parameters, where it was captured so; then ``form`` is the graph of
    ``source`` as it is, if a graph is asked for. ``hidden``: weights that may be pruned although the graph
    has no kernels of them, with their other names. Where the model cannot be captured, it is not
    ``is_lowered``: ``captured`` is the model, and ``graph`` has kernels alone.
    """

    given: nn.Module
    source: nn.Module
    captured: nn.Module
    graph: ChannelGraph
    before: Masks
    settled: nn.Module | None = None
    form: fx.GraphModule | None = None
    hidden: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_lowered: bool = True

    @property
    def direct(self) -> list[str]:
        """The parameters that are read without a call of their owner."""
        if self.is_lowered:
            assert isinstance(self.captured, fx.GraphModule)
            return [*direct_reads(self.captured), *self.hidden]  # who reads the hidden ones is not known
        return [name for name, kernels in self.graph.kernels.items() if kernels.direct]

    @property
    def read_by_code(self) -> list[str]:
        """The computed weights that the graph to return computes itself, from their parameters: unmasked."""
        nodes = [] if self.form is None else [node for node in self.form.graph.nodes if node.op == "get_attr"]
        paths = [str(node.target) for node in nodes]
        return [
            name
            for name in (computed_weights(self.source) if paths else ())
            if any(path.startswith(_parts_of(name)) for path in paths)
        ]

    @property
    def scored(self) -> nn.Module:
        """The model whose parameters are the weights of ``graph``, with their values."""
        if self.settled is None or self.settled is self.source:
            return unwrap(inside(self.given))
        return self.settled


def inside(model: nn.Module) -> nn.Module:
    """Return the model that a ``DistributedDataParallel`` wraps, or ``model`` itself."""
    wrapped: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return wrapped


def captured(
    given: nn.Module, source: nn.Module, example_inputs: Any, wish: Request, asker: Asker, display: Display
) -> Network:
    """Capture and lower ``source``, which is ``given`` without masks, and warn of weights out of reach.

    ``asker``: what will find masks. If it prunes computed weights, they are plain ones in the graph. A model
    that cannot be captured is looked at in a run.
    """
    flat = settled(source) if asker.prunes_computed else source
    root = None if flat is source else next((n for n in computed_weights(source) if "." not in n), None)
    if root is not None and wish.returns == "graph":
        raise ValueError(f"model: its own {root!r} is computed by a parametrization; take returns='module'")
    before = read(inside(given))
    with display.step("capture"):
        try:
            gm = capture_own(flat, example_inputs)
            again = flat is not source and wish.returns == "graph"
            form = duplicate(capture_own(source, example_inputs)) if again else None
        except CaptureError as error:
            graph = _graph_without_capture(flat, example_inputs, wish, asker, error)
            return Network(given, source, duplicate(flat), graph, before, flat, is_lowered=False)
    with display.step("lower"):
        graph = lower(gm, rules=wish.rules)
    hidden = _layers_without_paths(gm, graph, wish, asker.needs)
    _warn_of_rest(gm, graph, hidden)
    network = Network(given, source, gm, graph, before, flat, form, hidden)
    if dense := network.read_by_code:
        names = ", ".join(map(repr, dense))
        why = f"{names}: code reads what a parametrization computes, and the graph computes it by itself"
        if isinstance(wish.granularity, Channel):
            raise ValueError(f"model: {why}; no channels go there: take returns='module'")
        warnings.warn(f"{why}; not pruned: returns='module' prunes it", stacklevel=users_level())
    return network


def _parts_of(name: str) -> tuple[str, ...]:
    """The beginnings of the names of parameters from which a weight is computed, in PyTorch's two ways."""
    path, _, weight = name.rpartition(".")
    return f"{path}.parametrizations.{weight}.", f"{path}.{weight}_v", f"{path}.{weight}_orig"


def _layers_without_paths(
    gm: fx.GraphModule, graph: ChannelGraph, wish: Request, needs: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Name the layers inside of what has no paths, with their other names; none where ``needs`` say paths."""
    alone = "graph" not in needs and not isinstance(wish.granularity, Channel)
    return hidden_layers(gm, graph) if alone and wish.on_collapse != "repair" else {}


def _graph_without_capture(
    model: nn.Module, example_inputs: Any, wish: Request, asker: Asker, error: CaptureError
) -> ChannelGraph:
    """Find the weights of a model that has no graph, or say why they are of no use to ``asker``."""
    if wish.returns == "graph":
        raise CaptureError(f"{error}; or returns='module', which prunes without a graph") from error
    if "graph" in asker.needs:
        raise CaptureError(
            f"{error}; method {asker.name!r} asks about paths, which need the graph; magnitude, random, snip,"
            " force, grasp and ntk-sap do without"
        ) from error
    if isinstance(wish.granularity, Channel):
        raise CaptureError(f"{error}; channels need the graph, granularity='weight' does not") from error
    args, kwargs = example_inputs_for(model, example_inputs)
    graph = graph_of_run(duplicate(model), args, kwargs, str(error))
    names = ", ".join(map(repr, graph.overwritten))
    dense = f"; {names} not pruned, as each call overwrites it" if names else ""
    warnings.warn(
        f"{error}; pruned without a graph: no paths, no channels, no look for collapsed layers{dense}",
        stacklevel=users_level(),
    )
    return graph


def build_problem(
    network: Network, wish: Request, progress: Progress, group: ProcessGroup | None = None
) -> Problem:
    """Build the problem that a method is given, with a private copy of the network where it needs one.

    ``group``: the processes that score together. Raises ``ValueError`` for weights without values, a budget
    that no masks can meet, and parameters that cannot be masked.
    """
    _demand_values(network.scored, network.graph)
    names = {name: kernels.aliases for name, kernels in network.graph.kernels.items()} | dict(network.hidden)
    for name in (dense := network.read_by_code):
        names.pop(name, None)
    prunable = [name for name, others in names.items() if not wish.excludes(network.scored, (name, *others))]
    if wish.method.updates:
        _demand_plain(network.source, prunable, wish.method.name)
    parameters = {name: network.captured.get_parameter(name) for name in prunable}
    # What fully_shard has split is on the meta device here.
    present = [parameter.device for parameter in parameters.values() if not parameter.is_meta]
    home = present[0] if present else torch.device("cpu")
    device = resolve_device(wish.device) or home
    masks: Masks = {}
    for name, parameter in parameters.items():
        where = home if parameter.is_meta else parameter.device
        whole = torch.ones(parameter.shape, dtype=torch.bool, device=where)
        masks[name] = network.before.get(name, whole)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    weighed = isinstance(wish.granularity, Channel) and wish.granularity.of != "weights"
    # Where other costs are saved, the weights that are left say nothing of what is left to save.
    budget = plan(wish.budget, wish.sparsity, shapes, None if weighed else kept(masks)).capped(kept(masks))
    check(network.captured, masks)
    copy = network.captured if _may_share(wish, device == home) else duplicate(network.captured)
    problem = Problem(
        model=copy if device == home else copy.to(device),
        graph=network.graph,
        weights={
            name: weight if weight.is_meta else weight.to(device)
            for name, weight in ((name, copy.get_parameter(name).detach()) for name in prunable)
        },
        masks={name: mask.to(device) for name, mask in masks.items()},
        budget=budget,
        data=wish.data,
        loss_fn=wish.loss_fn,
        granularity=wish.granularity,
        schedule=wish.schedule,
        generator=torch.Generator().manual_seed(wish.seed),
        device=device,
        progress=progress,
        micro_batch=wish.micro_batch,
        group=group,
        fixed=(*excluded_parameters(wish.exclude, network.scored, network.graph), *dense),
    )
    if wish.budget == "owl":
        problem = replace(problem, budget=outlier_budget(problem))
    return _with_limit(_with_times(problem))


def _may_share(wish: Request, at_home: bool) -> bool:
    """Whether a method may be given the network itself: nothing runs, moves or becomes the result."""
    timed = isinstance(wish.granularity, Channel) and wish.granularity.of == "latency"
    return wish.method.reads_only and wish.returns != "graph" and at_home and not timed


def _with_limit(problem: Problem) -> Problem:
    """Give a problem the budget that its granularity asks for, if that says what the network may cost."""
    grain = problem.granularity
    if not isinstance(grain, ChannelGroups) or grain.options.at_most is None:
        return problem
    share = min(grain.options.at_most / grain.whole, 1.0)
    if share >= 1:
        whole = in_unit(grain.whole, grain.options.of)
        warnings.warn(
            f"at_most={grain.options.at_most:g}: the network takes {whole} as it is, no channel goes",
            stacklevel=users_level(),
        )
    budget, left = problem.budget, sum(kept(problem.masks).values())
    total = int(min(grain.options.at_most, left)) if grain.options.of == "weights" else budget.total
    return replace(problem, budget=replace(budget, total=total, asked=share))


def _with_times(problem: Problem) -> Problem:
    """Give the granularity of a problem the time that groups take, if that is what is to be saved."""
    grain = problem.granularity
    if not isinstance(grain, ChannelGroups) or grain.options.of != "latency":
        return problem
    assert isinstance(problem.model, fx.GraphModule)
    options = grain.options
    cost = latency_cost(problem.model, grain.groups, options.runtime, options.threads)
    return replace(problem, granularity=replace(grain, counted=lambda groups: cost))


def adopted(model: nn.Module, returns: str) -> nn.Module:
    """Return a model that ``torch.nn.utils.prune`` has pruned as a masked copy; any other as it is.

    Raises ``ValueError`` where such a model is to be pruned in place.
    """
    masks = masks_of_torch(unwrap(inside(model))) if isinstance(model, nn.Module) else {}
    if not masks:
        return model
    if returns == "inplace":
        name = next(iter(masks))
        raise ValueError(
            f"model: torch.nn.utils.prune has pruned {name!r}; call torch.nn.utils.prune.remove(module,"
            " 'weight') for each such module first, or take returns='graph' or 'module'"
        )
    copy = finalize(inside(model))
    put_masks(copy, read(model))
    return copy


def _warn_of_rest(gm: fx.GraphModule, graph: ChannelGraph, hidden: Collection[str]) -> None:
    """Name the matrix weights of a captured model that cannot be pruned, if they are many.

    ``hidden``: those that are pruned although the graph has no kernels of them.
    """
    every = matrices_outside(gm, graph)
    outside = {name: size for name, size in every.items() if name not in hidden}
    rest, whole = sum(outside.values()), sum(every.values()) + graph.prunable
    if rest > OUTSIDE * whole:
        warnings.warn(
            f"{rest / whole:.0%} of the {whole:,} matrix weights cannot be pruned, sparsity is of the"
            f" others: {listed_sizes(outside)}; fxprune.lower(graph).opaque lists ops to write rules for",
            stacklevel=users_level(),
        )


def _demand_values(model: nn.Module, graph: ChannelGraph) -> None:
    for name in graph.kernels:
        if model.get_parameter(name).is_meta:
            raise ValueError(
                f"model: {name!r} has no values (it is on the meta device); load the weights first"
            )


def _demand_plain(source: nn.Module, prunable: list[str], method: str) -> None:
    """``ValueError`` for a prunable weight that is computed: new values would have no place."""
    own = computed_weights(source)
    name = next((name for name in prunable if name in own), None)
    if name is not None:
        raise ValueError(
            f"model: {name!r} is computed by a parametrization, and method {method!r} returns new values "
            "for it; remove the parametrization, or exclude the weight"
        )


def rewrite(
    network: Network, problem: Problem, masks: Masks, wish: Request, weights: Weights | None = None
) -> nn.Module:
    """Put ``masks`` into the form of the model that ``wish.returns`` names, and return it.

    ``weights``: new values that a method has found, by name; they are put in place before the masks.
    Under ``reinit`` weights are drawn anew first: the masks were found for weights that are then forgotten.
    """
    if wish.returns == "graph":
        graph = problem.model if wish.device is None else duplicate(network.captured)
        form: nn.Module = graph if network.form is None else network.form
    else:
        form = network.given if wish.returns == "inplace" else duplicate(network.source)
    if wish.reinit:
        redraw(inside(form), torch.Generator().manual_seed(wish.seed), network.before)
    for name, values in (weights or {}).items():
        unwrap(form).get_parameter(name).data.copy_(values)
    _mask(form, network, problem, masks)
    return form


def masked_copy(network: Network, problem: Problem, masks: Masks) -> nn.Module:
    """Return a copy of the captured network with ``masks``, on the device where the problem is."""
    form = duplicate(network.captured).to(problem.device)
    _mask(form, network, problem, masks)
    return form


def _mask(form: nn.Module, network: Network, problem: Problem, masks: Masks) -> None:
    every = {**network.before, **masks, **_entries(network, problem, masks)}
    put_masks(form, every, direct=[name for name in network.direct if name in every])


def _entries(network: Network, problem: Problem, masks: Masks) -> Masks:
    """Return masks of the biases and norms of channels that are gone, so that these channels are zero."""
    if not isinstance(problem.granularity, ChannelGroups):
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in network.captured.named_parameters()}
    found, before = problem.granularity.entries(masks, shapes), network.before
    return {
        name: mask & before[name].to(mask.device) if name in before else mask for name, mask in found.items()
    }


def checked(method: Method, found: Any, problem: Problem) -> Masks:
    """Check that the masks that a method returned meet the problem; return them on its device."""
    if not isinstance(found, Mapping):
        raise TypeError(f"method {method.name!r} returned a {type(found).__name__}, expected a dict of masks")
    try:
        validate(found, {name: weight.shape for name, weight in problem.weights.items()})
    except (TypeError, ValueError) as error:
        raise type(error)(f"method {method.name!r} returned wrong {error}") from error
    masks = {name: found[name].to(problem.device) for name in problem.weights}
    if not is_subset(masks, problem.masks):
        raise ValueError(f"method {method.name!r} keeps weights that were pruned before")
    if isinstance(problem.granularity, ChannelGroups):
        problem.granularity.check(masks, problem.budget, method.name)
        return masks
    numbers, budget = kept_overall(masks, problem.shards), problem.budget
    asked = {"the model": budget.total} if budget.layers is None else budget.layers
    given = {"the model": sum(numbers.values())} if budget.layers is None else numbers
    for where, number in asked.items():
        # Whole groups may have to stay below the budget; single weights need not.
        if given[where] > number or (given[where] < number and problem.granularity == WEIGHT):
            raise ValueError(f"method {method.name!r} keeps {given[where]} weights in {where}, not {number}")
    return masks
