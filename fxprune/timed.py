"""Find masks whose compact network takes a share of the whole one's time, as measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fxprune.latency.target import TOLERANCE, LatencyTarget, meet_latency, stopwatch
from fxprune.methods import Problem
from fxprune.network import Network, masked_copy
from fxprune.request import Request
from fxprune.rewrite.compact import compact
from fxprune.rewrite.masking.copying import duplicate
from fxprune.sparsity.group_selection import ROUNDING, ChannelGroups, OutOfReach
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

    lowest: list[OutOfReach] = []

    def find_within(asked: float) -> Masks:
        generator = torch.Generator().manual_seed(wish.seed)
        budget = replace(problem.budget, asked=asked)
        return find(replace(problem, budget=budget, generator=generator, history={}))

    def prune(asked: float) -> tuple[Masks, float, float]:
        lowest.clear()
        try:
            masks = find_within(asked)
        except OutOfReach as error:  # as predicted, which is not always as measured
            lowest.append(error)
            asked = min(error.share * (1 + ROUNDING), 1.0)
            masks = find_within(asked)
        ones = {name: mask.double() for name, mask in masks.items()}
        return masks, grain.cost(masks).left(grain.pool(ones, masks)[1]), asked

    def timed(masks: Masks) -> tuple[float, float]:
        whole, least = measure(
            compact(masked_copy(network, problem, masks).eval(), verify=False, progress=False)
        )
        if lowest and least > wanted(whole) * (1 + TOLERANCE):
            raise ValueError(_out_of_reach(wanted(whole), whole, least, limit, lowest[0].why))
        return whole, least

    with stopwatch(dense, runtime, threads, batch) as measure:
        masks, times, rounds = meet_latency(
            prune,
            timed,
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


def _out_of_reach(target: float, whole: float, least: float, limit: float | None, why: str) -> str:
    """Say that the smallest network that there is takes longer than the target, as measured."""
    ask = f"at_most={math.ceil(1e3 * least) / 1e3} or more"
    if limit is None:
        ask = f"a sparsity of at most {max(math.floor(1e2 * (1 - least / whole)) / 1e2, 0.0):g}"
    return (
        f"of='latency': {target:.3g} of {whole:.3g} ms are to be kept, but the smallest network takes"
        f" {least:.3g} ms, as measured: {why}; ask for {ask}"
    )
