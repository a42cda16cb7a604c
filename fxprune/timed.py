"""Find masks whose compact network takes a share of the whole one's time, as measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fxprune.latency.target import LatencyTarget, meet_latency, stopwatch
from fxprune.methods import Problem
from fxprune.network import Network, masked_copy
from fxprune.request import Request
from fxprune.rewrite.compact import compact
from fxprune.rewrite.masking.copying import duplicate
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks

__all__ = ["find_in_time", "is_timed"]


def is_timed(problem: Problem) -> bool:
    """Whether the sparsity of a problem is a share of the time."""
    grain = problem.granularity
    return isinstance(grain, ChannelGroups) and grain.options.of == "latency"


def find_in_time(
    network: Network, problem: Problem, wish: Request, find: Callable[[Problem], Masks]
) -> tuple[Masks, LatencyTarget]:
    """Prune, compact and measure until the time is the one that was asked for; every round scores anew."""
    grain = problem.granularity
    assert isinstance(grain, ChannelGroups)
    limit, share = grain.options.at_most, 1 - wish.sparsity

    def wanted(dense: float) -> float:
        return share * dense if limit is None else limit

    dense = duplicate(network.captured).to(problem.device).eval()
    runtime, threads = grain.options.runtime, grain.options.threads or torch.get_num_threads()
    batch = network.graph.samples

    def prune(asked: float) -> tuple[Masks, float]:
        generator = torch.Generator().manual_seed(wish.seed)
        budget = replace(problem.budget, asked=asked)
        masks = find(replace(problem, budget=budget, generator=generator, history={}))
        ones = {name: mask.double() for name, mask in masks.items()}
        return masks, grain.cost(masks).left(grain.pool(ones, masks)[1])

    with stopwatch(dense, runtime, threads, batch) as measure:
        masks, times, rounds = meet_latency(
            prune,
            lambda masks: measure(compact(masked_copy(network, problem, masks).eval(), verify=False)),
            wanted,
            share if limit is None else limit / measure(duplicate(dense))[0],
        )
    dense_time, predicted, measured = times
    return masks, LatencyTarget(
        dense_time,
        wanted(dense_time),
        predicted,
        measured,
        runtime,
        threads,
        batch,
        str(problem.device),
        rounds,
    )
