"""Prepare a model for training: capture and lower it, and mask the form of it that was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from fxprune.finite import warn_of_strange_parameters
from fxprune.latency import check_runtime
from fxprune.methods import Problem
from fxprune.network import Asker, adopted, build_problem, rewrite
from fxprune.progress import Display
from fxprune.request import Request, blamed_on_data, tables, with_shapes
from fxprune.rewrite import bare, read
from fxprune.rewrite.masking.computed import present_weight
from fxprune.scoring.contract import silent
from fxprune.scoring.distributed import everybody
from fxprune.sparsity.granularity import CHANNEL_OPTIONS, Channel, Granularity, in_unit, resolve
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.training.contract import TrainingMethod
from fxprune.whole_models import captured_or_called

Returns = Literal["graph", "module", "inplace"]


def prepare(model: nn.Module, example_inputs: Any, wish: Request, method: TrainingMethod) -> Problem:
    """Capture and lower ``model`` and mask the form of it that ``wish.returns`` names; prune nothing yet.

    Where ``method`` does not ask for paths, layers without any are pruned too; where its weights do not come
    back, so are those that are computed by a parametrization.

    Returns the problem as it is before training; its ``model`` is the masked one.
    Raises what :func:`fxprune.apply` raises for models and arguments that do not fit, and ``ValueError`` for
    a target that channels cannot meet.
    """
    wish.check(model)
    asker = Asker(method.name, method.needs, prunes_computed=not method.regrows)
    problem = _prepared(model, example_inputs, wish, asker)
    if isinstance(problem.granularity, ChannelGroups):
        # Now, and not in the epoch in which the target would be met.
        sizes = {name: weight.abs() for name, weight in problem.weights.items()}
        problem.granularity.check_reach(sizes, problem.budget, problem.masks)
    return problem


def prepare_smaller(model: fx.GraphModule, before: Problem, wish: Request) -> Problem:
    """Prepare the smaller network that compaction has made of the model of ``before``, masked as it was.

    What was prunable is so still, if it is there. The budget is that of ``before``, of the parameters left.
    """
    free = {id(parameter) for name, parameter in model.named_parameters() if name in before.weights}
    open_tables = set(tables(before.graph)) - set(before.fixed)
    rest = tuple(
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in free and name not in open_tables
    )
    again = replace(wish, budget="global", returns="graph", exclude=rest)
    with _quiet():
        problem = _prepared(model, None, again, Asker(wish.method.name, wish.method.needs))
    sizes, old = problem.budget.sizes, before.budget
    layers = None
    if old.layers is not None:
        layers = {name: min(old.layers[name], size) for name, size in sizes.items()}
    total = old.total if layers is None else sum(layers.values())
    cast(fx.GraphModule, problem.model).meta["fxprune"] = model.meta["fxprune"]
    budget = replace(old, total=total, sizes=sizes, layers=layers)
    return replace(problem, budget=budget, generator=before.generator)


def take_granularity(granularity: str | Granularity, options: dict[str, Any]) -> Granularity:
    """Take the options of channels out of ``options``, and return the granularity that they make."""
    own = {name: options.pop(name) for name in CHANNEL_OPTIONS if name in options}
    found = resolve(granularity, **own)
    if isinstance(found, Channel):
        check_runtime(found.runtime)
    return found


def without_limit(model: nn.Module, example_inputs: Any, wish: Request) -> tuple[Granularity, float]:
    """Return a granularity without its ``at_most``, and the sparsity that comes to the same in this model.

    ``ValueError`` where the whole network costs no more than that.
    """
    grain = wish.granularity
    assert isinstance(grain, Channel)
    wish.check(model)
    with _quiet():
        asker = Asker(wish.method.name, wish.method.needs)
        problem = _prepared(model, example_inputs, replace(wish, returns="graph"), asker)
    asked = problem.budget.asked
    if asked is None or asked >= 1:
        whole = in_unit(whole_cost(problem), grain.of)
        raise ValueError(f"at_most={grain.at_most!r}: the network takes {whole} as it is")
    return replace(grain, at_most=None), 1 - asked


def whole_cost(problem: Problem) -> float:
    """Give the cost of the network without masks, in the unit of its channel granularity; 1 for any other."""
    return problem.granularity.whole if isinstance(problem.granularity, ChannelGroups) else 1.0


@contextmanager
def named_as_given(sparsity: float | None, options: dict[str, Any]) -> Iterator[float | None]:
    """Take ``target``, another name of the sparsity, out of ``options``; give the one that is there.

    Errors within name the argument as it was given. ``ValueError`` if both are there.
    """
    target: float | None = options.pop("target", None)
    if sparsity is not None and target is not None:
        raise ValueError(f"sparsity={sparsity!r} and target={target!r}: two names of one number; give one")
    try:
        yield sparsity if target is None else target
    except (TypeError, ValueError) as error:
        given, kind = f"sparsity={target!r}", type(error)
        if target is None or given not in str(error) or kind not in (TypeError, ValueError):
            raise
        raise kind(str(error).replace(given, f"target={target!r}")) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Do not warn again of what is said once for a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _prepared(model: nn.Module, example_inputs: Any, wish: Request, asker: Asker) -> Problem:
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        model = adopted(model, wish.returns)
        inputs, wish = with_shapes(model, example_inputs, wish)
        with blamed_on_data(model, example_inputs, wish):
            # Not `plain`: capture refuses a model that fully_shard has split, as it should here.
            source = bare(model) if read(model) else model
            network, wish = captured_or_called(model, source, inputs, wish, asker, Display(enabled=False))
        warn_of_strange_parameters(model, "look for what made them so, before it trains on", stacklevel=4)
        # Processes score data of their own together; without data they have nothing to tell each other.
        problem = build_problem(network, wish, silent, None if wish.data is None else everybody())
        masked = rewrite(network, problem, problem.masks, wish)
        weights = {name: present_weight(masked, name).detach() for name in problem.weights}
    return replace(problem, model=masked, weights=weights)
