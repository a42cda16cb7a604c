"""Prune a model in five steps: capture, lower, score, select, rewrite; only this file knows their order.

All arguments are checked before the first step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import fx, nn

from fxprune import sharding
from fxprune.capture import CaptureError, capture
from fxprune.capture.errors import check_module
from fxprune.capture.inputs import example_inputs_for
from fxprune.graph import ChannelGraph
from fxprune.latency import LatencyTarget, check_runtime
from fxprune.lowering import Rules, graph_of_run, hidden_layers, lower, matrices_outside
from fxprune.methods import Method, Problem, Weights, new_weights, separate
from fxprune.metrics import Report, measure
from fxprune.network import Network, adopted, build_problem, checked, inside, rewrite, warn_of_rest
from fxprune.paths.count import reach
from fxprune.plans import Plan
from fxprune.progress import Display
from fxprune.request import (
    GENERAL,
    Exclusion,
    Request,
    blamed_on_data,
    default_sparsity,
    exclusions,
    method_of,
    with_shapes,
)
from fxprune.rewrite import plain, provenance, read, stamp
from fxprune.rewrite.masking.computed import computed_weights, settled
from fxprune.rewrite.masking.copying import duplicate
from fxprune.sparsity.budget import Allocation
from fxprune.sparsity.collapse import dead_layers, repair
from fxprune.sparsity.granularity import CHANNEL_OPTIONS, Channel, Granularity
from fxprune.sparsity.granularity import resolve as resolve_granularity
from fxprune.sparsity.group_selection import ChannelGroups, Choice
from fxprune.sparsity.masks import Masks, nonzeros
from fxprune.sparsity.schedule import DensityFunction, Schedule
from fxprune.timed import find_in_time, is_timed

Returns = Literal["graph", "module", "inplace"]
OnCollapse = Literal["warn", "raise", "repair"]

LISTED = 20
"""Collapsed layers that a message names; the report names them all."""


def apply(
    model: nn.Module,
    method: str | Method | Plan = "synflow",
    sparsity: float | None = None,
    *,
    example_inputs: Any = None,
    data: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    budget: Allocation | None = None,
    granularity: str | Granularity = "weight",
    schedule: str | Schedule | DensityFunction | None = None,
    exclude: Exclusion | Iterable[Exclusion] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    returns: Returns = "graph",
    on_collapse: OnCollapse = "warn",
    rules: Rules | None = None,
    **method_options: Any,
) -> fx.GraphModule:
    """Prune a copy of ``model``: masked modules in a graph that trains, evaluates, compiles and exports.

    Args:
        model: any module. If it was pruned before, more is removed; what is pruned stays pruned.
        method: a name of ``list_methods()``, a :class:`Method` or a :class:`Plan`; ``method_options`` are its
            own, and those of all: ``shuffle``, ``invert``, ``reinit`` (draw weights anew), ``micro_batch``.
        sparsity: fraction of the prunable weights to remove, in [0, 1), to one weight; 0.9, or an N:M's own.
        example_inputs: tensor, tuple or dict; else as in ``data``, or as timm and torchvision models say.
        data, loss_fn: for methods that look at data: (x, y), or an iterable of batches; a loss of (out, y).
        budget: "global" (default), "uniform", "erk", or {layer or pattern: sparsity}.
        granularity: "weight", "kernel", "2:4", "block(16,16)"; "channel", "head": see docs/channels.md.
        schedule: "oneshot", "linear", "exponential", "cubic", "sigmoid", also "cubic(20)"; the method's own.
        exclude: names or patterns of modules or parameters, or module types, that are never pruned.
        seed, device: the seed of all randomness; where to score (the result is on the model's own device).
        progress, rules: bars on stderr; op rules, as for :func:`fxprune.lower`.
        returns: "graph", a ``torch.fx.GraphModule``; "module", the own class; "inplace", the model itself.
        on_collapse: what to do when a layer lies on no path any more: "warn", "raise", or "repair".

    Raises:
        TypeError, ValueError: an argument that does not fit, named, before anything is scored.
        RuntimeError: layers collapsed under ``on_collapse="raise"``, or could not be repaired; the model
            has no graph, and ``returns``, the method or the granularity needs one (else a warning says so).
    The caller's model (unless "inplace"), its modes and the global random state are left alone.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruned = apply(net, sparsity=0.75, example_inputs=torch.ones(2, 4))
    >>> sum(int(mask.sum()) for mask in read(pruned).values())
    12
    """
    display = Display(enabled=progress)
    if isinstance(method, Plan):
        asked = budget is not None or granularity != "weight" or schedule is not None or exclude != ()
        return _executed(model, method, example_inputs, device, returns, on_collapse, rules, display,
                         asked or method_options)  # fmt: skip
    wish = ask(model, method, sparsity, data=data, loss_fn=loss_fn, budget=budget, granularity=granularity,
               schedule=schedule, exclude=exclude, seed=seed, device=device, returns=returns,
               on_collapse=on_collapse, rules=rules, **method_options)  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        return _finished(wish, *search(model, example_inputs, wish, display))


def ask(
    model: nn.Module,
    method: str | Method,
    sparsity: float | None,
    *,
    budget: Allocation | None = None,
    granularity: str | Granularity = "weight",
    exclude: Exclusion | Iterable[Exclusion] = (),
    data: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    schedule: str | Schedule | DensityFunction | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    returns: str = "graph",
    on_collapse: str = "warn",
    rules: Rules | None = None,
    **method_options: Any,
) -> Request:
    """Check the arguments of :func:`apply`, and hold them as a request."""
    general, channels = _taken(method_options, GENERAL), _taken(method_options, CHANNEL_OPTIONS)
    network, grain = inside(model), resolve_granularity(granularity, **channels)
    wish = Request(
        method_of(method, method_options), default_sparsity(grain) if sparsity is None else sparsity, data,
        loss_fn, "global" if budget is None else budget, grain, schedule, exclusions(exclude), seed, device,
        returns, on_collapse, rules=rules, asked=sparsity is not None, **general,
    )  # fmt: skip
    wish.check(network)
    sharding.check(network, wish)
    if isinstance(grain, Channel):
        check_runtime(grain.runtime)
    return wish


def analyze(
    gm: nn.Module,
    resolution: Literal["spatial", "channel"] = "spatial",
    *,
    example_inputs: Any = None,
    rules: Rules | None = None,
) -> Report:
    """Count the weights left of a network under its masks, and those of them that have any effect.

    A weight counts as removed where a mask says so and, in parameters without a mask, where it is exactly
    zero: the report on a finalized model, or on a plain one that was given its weights, is that of the masks.

    Args:
        gm: what :func:`apply` or :func:`capture` returned, or any other model; it is not changed.
        resolution: "spatial" tells positions apart and is exact; "channel" takes all positions for one,
            which is exact for periodic images, never below the truth otherwise, and faster.
        example_inputs: for models that are not captured yet, as in :func:`apply`.
        rules: op rules of your own, as for :func:`fxprune.lower`.

    Returns:
        A :class:`fxprune.metrics.Report`; ``print`` shows it as a table, ``to_json()`` writes it down.

    Raises:
        TypeError, ValueError: ``gm`` is no module, its inputs are not known, or the resolution is.

    >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    >>> report = analyze(net, example_inputs=torch.ones(1, 4))
    >>> report.effective_nodes, round(torch.tensor(report.log_paths).exp().item())
    (5, 24)
    """
    if resolution not in ("spatial", "channel"):
        raise ValueError(f"resolution={resolution!r}: expected 'spatial' or 'channel'")
    check_module(gm, "gm")
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        masks = read(gm)
        source = settled(plain(gm))
        if example_inputs is None and _has_shapes(source):
            network = cast(fx.GraphModule, source)
        else:
            network = capture(source, example_inputs)
        graph = lower(network, rules=rules)
        zeros = {
            name: mask
            for name, mask in nonzeros(source, graph.kernels).items()
            if name not in masks and not mask.all()
        }
        known = _known(graph, {**masks, **zeros})
        outside = matrices_outside(network, graph)
        removed = sum(int((~masks[name]).sum()) for name in outside if name in masks)
        report = measure(graph, known, resolution, outside, removed)
    noted = provenance(gm)
    return replace(report, asked=noted["sparsity"]) if noted.get("default") == "sparsity" else report


def _taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the options called ``names`` out of ``options``, and return them."""
    return {name: options.pop(name) for name in names if name in options}


def _has_shapes(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and all("val" in node.meta for node in model.graph.nodes)


Found = tuple[Network, Problem, Masks, Weights, LatencyTarget | None]
"""The network, the problem, the masks and new weights that were found, and the times, if asked for."""


def search(
    given: nn.Module, example_inputs: Any, wish: Request, display: Display, seen: list[Choice] | None = None
) -> Found:
    """Capture, lower, score and select; ``seen`` notes what channel groups are chosen by."""
    given = adopted(given, wish.returns)
    model = inside(given)
    inputs, wish = with_shapes(model, example_inputs, wish)
    with blamed_on_data(model, example_inputs, wish):
        network = _network(given, inputs, wish, display)
    before = network.before
    asked = build_problem(network, wish, display, _everybody())
    if seen is not None and isinstance(asked.granularity, ChannelGroups):
        asked = replace(asked, granularity=replace(asked.granularity, seen=seen))
    # A method scores and selects.
    with sharding.asked(asked, model, wish.method) as question:
        problem = question.problem
        question.masks, weights, time = _masks(network, problem, wish)
    with display.step(f"look for layers without a path (on_collapse={wish.on_collapse!r})"):
        masks = question.masks
        if isinstance(network.captured, fx.GraphModule):
            masks = _without_collapse(problem, masks, before, wish)
    return network, problem, masks, weights, time


def _finished(
    wish: Request,
    network: Network,
    problem: Problem,
    masks: Masks,
    weights: Weights,
    time: LatencyTarget | None,
) -> fx.GraphModule:
    """Rewrite the model under its masks, and note where they come from."""
    pruned = rewrite(network, problem, masks, wish, weights)
    facts = {} if wish.asked else {"default": "sparsity"}
    stamp(pruned, method=wish.method.name, sparsity=wish.sparsity, seed=wish.seed, **facts)
    notes = {"latency": time, "history": problem.history or None}
    notes = {name: note for name, note in notes.items() if note is not None}
    if notes and isinstance(pruned, fx.GraphModule):
        pruned.meta["fxprune"] = {**pruned.meta.get("fxprune", {}), **notes}
    # Also the caller's own class is typed as a graph, for that is what apply gives unless asked for this.
    return cast(fx.GraphModule, pruned)


def _executed(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    device: str | torch.device | None,
    returns: str,
    on_collapse: str,
    rules: Rules | None,
    display: Display,
    asked: object,
) -> fx.GraphModule:
    """Remove the channels of a plan; ``asked`` is true where the caller asked for anything beside it."""
    if asked:
        raise ValueError(
            "method: a plan has its budget, granularity, schedule, exclude and options; apply(model, plan) "
            "takes example_inputs, device, returns, on_collapse, rules and progress beside it"
        )
    wish = ask(
        model, plan.as_method(), 0.0, granularity=plan.granularity(), exclude=plan.excluded, seed=plan.seed,
        device=device, returns=returns, on_collapse=on_collapse, rules=rules,
    )  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        pruned = _finished(wish, *search(model, example_inputs, wish, display))
    stamp(pruned, method=plan.method, sparsity=plan.sparsity, seed=plan.seed)
    return pruned


def _masks(network: Network, problem: Problem, wish: Request) -> tuple[Masks, Weights, LatencyTarget | None]:
    """Find masks by the method, and new weights; under ``of="latency"`` until the time is right."""
    weights: Weights = {}

    def find(problem: Problem) -> Masks:
        nonlocal weights
        found, values = separate(wish.method.find(problem))
        masks = checked(wish.method, found, problem)
        weights = new_weights(wish.method, values, masks, problem)
        return masks

    masks, time = find_in_time(network, problem, wish, find) if is_timed(problem) else (find(problem), None)
    return masks, weights, time


def _network(given: nn.Module, example_inputs: Any, wish: Request, display: Display) -> Network:
    """Capture and lower a model; one that cannot be captured is looked at in a run."""
    model = inside(given)
    before, source = read(model), plain(model)
    flat = settled(source)  # computed weights are scored as they are, like any other
    own = next((name for name in computed_weights(source) if "." not in name), None)
    if own is not None and wish.returns == "graph":
        raise ValueError(f"model: its own {own!r} is computed by a parametrization; take returns='module'")
    with display.step("capture"):
        try:
            gm = capture(flat, example_inputs)
            again = flat is not source and wish.returns == "graph"
            form = duplicate(capture(source, example_inputs)) if again else None
        except CaptureError as error:
            graph = _uncaptured(flat, example_inputs, wish, error)
            return Network(given, source, duplicate(flat), graph, before, flat)
    with display.step("lower"):
        graph = lower(gm, rules=wish.rules)
    alone = "graph" not in wish.method.needs and not isinstance(wish.granularity, Channel)
    hidden = hidden_layers(gm, graph) if alone and wish.on_collapse != "repair" else {}
    warn_of_rest(gm, graph, hidden, stacklevel=5)
    return Network(given, source, gm, graph, before, flat, form, hidden)


def _uncaptured(flat: nn.Module, example_inputs: Any, wish: Request, error: CaptureError) -> ChannelGraph:
    """Find the weights of a model that has no graph, or say why that is of no use here."""
    if wish.returns == "graph":
        raise CaptureError(f"{error}; or returns='module', which prunes without a graph") from error
    if "graph" in wish.method.needs:
        raise CaptureError(
            f"{error}; method {wish.method.name!r} asks about paths, which need the graph; magnitude, random,"
            " snip, force, grasp and ntk-sap do without"
        ) from error
    if isinstance(wish.granularity, Channel):
        raise CaptureError(f"{error}; channels need the graph, granularity='weight' does not") from error
    args, kwargs = example_inputs_for(flat, example_inputs)
    graph = graph_of_run(duplicate(flat), args, kwargs, str(error))
    warnings.warn(
        f"{error}; pruned without a graph: no paths, no channels, no look for collapsed layers",
        stacklevel=5,  # the line that called apply
    )
    return graph


def _everybody() -> dist.ProcessGroup | None:
    """Return the processes that score together: all of them, where there are several."""
    running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if running else None


def _without_collapse(problem: Problem, masks: Masks, before: Masks, wish: Request) -> Masks:
    """Repair collapsed layers, or raise or warn of them by name, as ``on_collapse`` says."""
    if all(bool(mask.all()) for mask in masks.values()):
        return masks
    others = {name: mask.to(problem.device) for name, mask in before.items() if name not in masks}
    dead = _dead(problem.graph, {**others, **masks})
    if dead and wish.on_collapse == "repair":
        masks = repair(
            problem.graph,
            masks,
            problem.weights,
            problem.budget,
            within=problem.masks,
            fixed=others,
            granularity=problem.granularity,
        )
        dead = _dead(problem.graph, {**others, **masks})
    if not dead:
        return masks
    where = ", ".join(dead[:LISTED]) + (f" and {len(dead) - LISTED} more" if len(dead) > LISTED else "")
    lost = "no path is left at all" if len(dead) == len(problem.graph.kernels) else "no path is left through"
    message = (
        f"layer collapse: method {wish.method.name!r} at sparsity {wish.sparsity}: {lost}: {where}; "
        "lower the sparsity, take another method or budget, or on_collapse='repair'"
    )
    if wish.on_collapse == "raise":
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=4)  # the line that called apply
    return masks


def _dead(graph: ChannelGraph, masks: Masks) -> tuple[str, ...]:
    return dead_layers(graph, reach(graph, _known(graph, masks)))


def _known(graph: ChannelGraph, masks: Masks) -> Masks:
    """The masks of parameters that the graph has kernels of; users may mask others, and they stay masked."""
    return {name: mask for name, mask in masks.items() if name in graph.kernels}
