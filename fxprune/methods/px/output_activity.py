"""Sum the active paths that end in every output of the network, over batches and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxprune.methods.px.active_paths import Activity
from fxprune.paths.scaled import EMPTY, Scaled, add, at_power, zeros_like
from fxprune.scoring.contract import Problem
from fxprune.scoring.data import Batch
from fxprune.scoring.distributed import average, largest
from fxprune.scoring.gradients import run_at, scoring, twice_differentiable
from fxprune.sparsity.masks import Masks
from fxprune.torch_private import pytree

__all__ = ["output_activities"]


def output_activities(problem: Problem, masks: Masks, batches: Sequence[Batch]) -> list[Scaled[int]]:
    """The squared gains of the active paths that end in every floating-point output of the network.

    They are summed over samples and averaged over processes, in float64, all at one power of two.
    """
    found: list[list[Scaled[int]]] = []
    with scoring(problem, "eval"), torch.no_grad(), twice_differentiable(), _plain_attention():
        for batch in batches:
            found.append(_active_paths(problem, masks, batch))
    totals = [add(numbers, numbers[0].values.shape) for numbers in zip(*found, strict=True)]
    power = largest(max((number.level for number in totals), default=EMPTY), problem.group)
    values = [at_power(number, power) for number in totals]
    average(values, problem.group)
    return [Scaled(each, power, power) for each in values]


def _active_paths(problem: Problem, masks: Masks, batch: Batch) -> list[Scaled[int]]:
    """The same for one batch, on this process."""
    weights = {name: (w * masks[name]).to(problem.device) for name, w in problem.weights.items()}
    activity = Activity({weights[name]: mask.to(problem.device) for name, mask in masks.items()})
    found: list[Scaled[int]] = []

    def follow(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        activity.start((args, kwargs))

    def collect(model: torch.nn.Module, args: Any, output: Any) -> None:
        real = [
            x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]
        ends = [activity.paths.get(x, zeros_like(x)) for x in real]
        found[:] = [end.with_values(end.values.double().sum(0)) for end in ends]

    hooks = (
        problem.model.register_forward_pre_hook(follow, with_kwargs=True),
        problem.model.register_forward_hook(collect),
    )
    try:
        with activity:
            run_at(problem, weights, batch, "px")
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Turn off the fused encoder layers of eval mode, whose inside cannot be followed."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
