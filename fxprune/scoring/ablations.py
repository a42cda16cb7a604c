"""Check a method's sanity: shuffle its masks, invert its scores, draw the weights under its masks anew.

A method that beats its own shuffled masks has found something beyond how many weights each layer keeps
(Frankle et al. 2021, arXiv 2009.08576; Su et al. 2020, arXiv 2009.11094).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from fxprune.scoring.contract import Found, Method, Problem, choose, noise
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.group_selection import ChannelGroups
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.sharded import kept_overall


def ablated(
    method: Method, *, shuffle: Literal["layer", "global"] | None = None, invert: bool = False
) -> Method:
    """Return ``method`` with its masks shuffled or its scores inverted, or itself if neither is asked for.

    Options:
        shuffle: "layer" puts the weights (or groups) that are kept at random places of their layer, "global"
            at random places of the network
        invert: keep the lowest scores instead of the highest, in every round

    Raises ``ValueError`` for ``invert`` with a method that builds its masks without scores, for ``shuffle``
    with one that returns weights; its ``find`` raises it for a global shuffle under a budget that fixes the
    layers.
    """
    if not shuffle and not invert:
        return method
    if invert and not method.scored:
        raise ValueError(f"method {method.name!r} has no scores to invert: it builds its masks directly")

    if shuffle and method.updates:
        raise ValueError(
            f"shuffle={shuffle!r}: method {method.name!r} returns weights that fit its own masks"
        )

    def find(problem: Problem) -> Found:
        if shuffle == "global" and problem.budget.layers is not None:
            raise ValueError(
                "shuffle='global' moves weights between layers, which the budget fixes; use shuffle='layer' "
                "or budget='global'"
            )
        asked = replace(problem, invert=problem.invert != invert)
        return method.find(asked) if shuffle is None else _shuffled(problem, method.masks(asked), shuffle)

    return replace(method, find=find)


def _shuffled(problem: Problem, masks: Masks, scope: str) -> Masks:
    """Keep as many weights as ``masks`` do, at places drawn at random, in every layer or overall.

    The places are those with the largest random numbers. Layers with tied channels are shuffled together.
    """
    order = {name: noise(problem, name).to(mask.device) for name, mask in masks.items()}
    if isinstance(problem.granularity, ChannelGroups):
        return problem.granularity.shuffle(masks, order, problem.masks, per_family=scope == "layer")
    bundles = problem.granularity.bundles(order, problem.masks)
    counts = kept_overall(masks, problem.shards)
    shuffled: Masks = {}
    for names in [tuple(masks)] if scope == "global" else [bundle.names for bundle in bundles]:
        sizes = {name: problem.budget.sizes[name] for name in names}
        budget = Budget(sum(counts[name] for name in names), sizes)
        within = {name: problem.masks[name] for name in names}
        shuffled |= choose(problem, {name: order[name] for name in names}, budget, within, "shuffle")
    return {name: shuffled[name] for name in masks}


def redraw(
    model: torch.nn.Module, generator: torch.Generator, masks: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Draw all parameters of ``model`` anew, in place, each from its own distribution.

    A random permutation of a tensor's entries is such a draw where they are independent and alike, whatever
    the initialiser was; constants (a norm at its start) stay. ``masks``: where parameters were pruned before,
    only the entries left are permuted, so that no zero comes in. Buffers stay.

    ``apply`` calls this under ``reinit=True`` on the copy that is to be pruned: after the masks were found
    for the original weights, and before they are installed.

    >>> layer = torch.nn.Linear(3, 2)
    >>> before = layer.weight.detach().flatten().sort().values
    >>> redraw(layer, torch.Generator().manual_seed(0))
    >>> torch.equal(layer.weight.detach().flatten().sort().values, before)
    True
    """
    known = masks or {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            left = known[name].to(parameter.device) if name in known else torch.ones_like(parameter).bool()
            values = parameter[left]
            order = torch.randperm(len(values), generator=generator)
            parameter[left] = values[order.to(values.device)]
