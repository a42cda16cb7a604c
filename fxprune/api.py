"""Prune a model: find masks and write them into it, or count what is left under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NoReturn, cast

import torch
from torch import fx, nn

from fxprune.capture import calls_whole, capture, in_shell, renamed
from fxprune.capture.errors import check_module
from fxprune.capture.shell import Shell
from fxprune.keywords import refuse_unknown
from fxprune.latency import LatencyTarget
from fxprune.lowering import Rules, lower, matrices_outside
from fxprune.methods import Method, Problem, Weights
from fxprune.metrics import Report, measure
from fxprune.network import Network, rewrite
from fxprune.plans import Plan
from fxprune.progress import Display
from fxprune.request import (
    Exclusion,
    Request,
)
from fxprune.rewrite import plain, provenance, read, stamp
from fxprune.rewrite.masking.computed import settled
from fxprune.search import ask, known_masks, search
from fxprune.sparsity.budget import Allocation
from fxprune.sparsity.granularity import Granularity
from fxprune.sparsity.masks import Masks, is_full, nonzeros
from fxprune.sparsity.schedule import DensityFunction, Schedule

Returns = Literal["graph", "module", "inplace"]
OnCollapse = Literal["warn", "raise", "repair"]


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
        data, loss_fn: for methods that look at data: (x, y), x alone, or batches of it; a loss of (out, y).
        budget: "global" (default), "uniform", "erk", "owl", or {layer or pattern: sparsity}.
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
        nothing = (sparsity, data, loss_fn, budget, schedule) == (None,) * 5
        asked = not nothing or granularity != "weight" or exclude != () or seed != 0
        return _executed(model, method, example_inputs, device, returns, on_collapse, rules, display,
                         asked or method_options)  # fmt: skip
    wish = ask(model, method, sparsity, data=data, loss_fn=loss_fn, budget=budget, granularity=granularity,
               schedule=schedule, exclude=exclude, seed=seed, device=device, returns=returns,
               on_collapse=on_collapse, rules=rules, **method_options)  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        return _finished(wish, *search(model, example_inputs, wish, display))


def analyze(
    gm: nn.Module,
    resolution: Literal["spatial", "channel"] = "spatial",
    *,
    example_inputs: Any = None,
    rules: Rules | None = None,
    **others: NoReturn,
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
    refuse_unknown(analyze, others)
    if resolution not in ("spatial", "channel"):
        if not isinstance(resolution, str):
            raise TypeError(
                f"resolution: got a {type(resolution).__name__}, expected 'spatial' or 'channel'; inputs are"
                " example_inputs=..."
            )
        raise ValueError(f"resolution={resolution!r}: expected 'spatial' or 'channel'")
    check_module(gm, "gm")
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        masks = read(gm)
        source = settled(plain(gm))
        known = example_inputs is None and _has_shapes(source)
        network = cast(fx.GraphModule, source) if known else capture(source, example_inputs)
        if calls_whole(network, source):
            source, masks = in_shell(source), renamed(masks)
        graph = lower(network, rules=rules)
        zeros = {
            name: mask
            for name, mask in nonzeros(source, graph.kernels).items()
            if name not in masks and not is_full(mask)
        }
        outside = matrices_outside(network, graph)
        removed = sum(int((~masks[name]).sum()) for name in outside if name in masks)
        report = measure(graph, known_masks(graph, {**masks, **zeros}), resolution, outside, removed)
    noted = provenance(gm)
    return replace(report, asked=noted["sparsity"]) if noted.get("default") == "sparsity" else report


def _has_shapes(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and all("val" in node.meta for node in model.graph.nodes)


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
    pruned = pruned.model if isinstance(pruned, Shell) else pruned
    facts = {} if wish.asked else {"default": "sparsity"}
    sparsity = wish.sparsity
    if getattr(wish.granularity, "at_most", None) is not None and problem.budget.asked is not None:
        facts, sparsity = {}, 1 - problem.budget.asked
    stamp(pruned, method=wish.method.name, sparsity=sparsity, seed=wish.seed, **facts)
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
            "method: a plan has its sparsity, budget, granularity, schedule, exclude, seed and options, and "
            "needs no data; apply(model, plan) takes example_inputs, device, returns, on_collapse, rules and "
            "progress beside it"
        )
    wish = ask(
        model, plan.as_method(), 0.0, granularity=plan.granularity(), exclude=plan.excluded, seed=plan.seed,
        device=device, returns=returns, on_collapse=on_collapse, rules=rules,
    )  # fmt: skip
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        pruned = _finished(wish, *search(model, example_inputs, wish, display))
    stamp(pruned, method=plan.method, sparsity=plan.sparsity, seed=plan.seed)
    return pruned
