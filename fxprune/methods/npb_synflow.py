"""NPB-SynFlow: SynFlow's rounds, with a fresh random mask now and then early on, to keep nodes in use."""

from __future__ import annotations

from typing import Literal

import torch

from fxprune.paths.count import flow
from fxprune.scoring.contract import Method, Problem, Scores, fixed_magnitudes, prune_in_rounds
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.schedule import Exponential, resolve


def npb_synflow(
    *,
    rounds: int = 100,
    refresh_every: int = 10,
    refresh_until: int = 30,
    resolution: Literal["spatial", "channel"] = "spatial",
) -> Method:
    """SynFlow with random node refresh (the variant of "Understanding pruning at initialization: an effective
    node-path balancing perspective", 2023).

    In rounds e = 0, ``refresh_every``, 2 ``refresh_every``, ... below ``refresh_until`` the score of every
    weight is N(0, 1): the mask of that round is random, and what was pruned may return. Random masks keep
    nodes in use; the rounds after them are SynFlow's (``|w| * d ln R / d|w|``) and keep paths. Needs nothing
    but shapes.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        refresh_every: rounds from one random mask to the next
        refresh_until: no random mask in this round or later; 0 for none at all, which is SynFlow
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster

    The paper gives no values for the two rounds, and its code does not declare them: these are ours. A random
    mask late, at few weights, cuts paths that nothing mends: random rounds end early, and the last round is
    SynFlow's whatever the options.

    Cost: as `synflow`.
    When: as `synflow`, where more channels should stay in use.
    """
    for option, value, least in (("refresh_every", refresh_every, 1), ("refresh_until", refresh_until, 0)):
        if value < least:
            raise ValueError(
                f"method 'npb-synflow': {option}={value!r}, expected an integer of at least {least}"
            )
    return Method(
        name="npb-synflow",
        find=lambda problem: _find(problem, Exponential(rounds), refresh_every, refresh_until, resolution),
        needs=frozenset({"graph"}),
        summary="SynFlow with random masks in early rounds, for nodes as well as paths; no data",
        paper="Understanding pruning at initialization: an effective node-path balancing perspective, 2023",
    )


def _find(
    problem: Problem, schedule: Exponential, every: int, until: int, resolution: Literal["spatial", "channel"]
) -> Masks:
    sizes = {name: weight.abs().float() for name, weight in problem.weights.items()}
    fixed = fixed_magnitudes(problem)
    last = resolve(problem.schedule, schedule).rounds - 1
    # Pruned weights come last in a SynFlow round, also where the caller has the lowest scores kept.
    worst = 1.0 if problem.invert else -1.0
    done = 0

    def carried(_: Problem, masks: Masks) -> Scores:
        nonlocal done
        e, done = done, done + 1
        if e % every == 0 and e < min(until, last):
            return {
                name: torch.randn(size.shape, generator=problem.generator).to(size.device)
                for name, size in sizes.items()
            }
        alive = {name: size * masks[name] for name, size in sizes.items()}
        gradients = flow(
            problem.graph, alive | fixed, resolution=resolution, pool="mean", products="mean"
        ).gradients
        return {name: (gradients[name] * size).where(masks[name], worst) for name, size in alive.items()}

    return prune_in_rounds(problem, carried, schedule=schedule, regrow=True, name="npb-synflow")
