"""Before training: a model comes in; the masked model, its graph and its budget go out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.request import Request
from fxprune.rewrite import bare, direct_reads, install, read
from fxprune.rewrite.masking.copying import duplicate
from fxprune.sparsity.budget import Budget, plan
from fxprune.sparsity.masks import Masks, kept

Returns = Literal["graph", "module", "inplace"]


@dataclass(frozen=True)
class Prepared:
    """A masked model, ready to train: ``model``, its ``graph``, and the ``budget`` at the end."""

    model: nn.Module
    graph: ChannelGraph
    budget: Budget


def prepare(model: nn.Module, example_inputs: Any, wish: Request, returns: Returns) -> Prepared:
    """Captures and lowers ``model`` and masks the form of it that ``returns`` names; nothing is pruned yet.

    Raises what :func:`fxprune.apply` raises for models and arguments that do not fit.
    """
    wish.check(model)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        before = read(model)
        source = bare(model) if before else model
        gm = capture(source, example_inputs)
        graph = lower(gm, rules=wish.rules)
        prunable = {
            name: kernels
            for name, kernels in graph.kernels.items()
            if not wish.excludes(source, (name, *kernels.aliases))
        }
        masks: Masks = {
            name: before.get(name, torch.ones_like(gm.get_parameter(name), dtype=torch.bool))
            for name in prunable
        }
        shapes = {name: tuple(kernels.shape) for name, kernels in prunable.items()}
        budget = plan(wish.budget, wish.sparsity, shapes, kept(masks))
        direct = [name for name in direct_reads(gm) if name in masks or name in before]
        if returns == "graph":
            masked: nn.Module = duplicate(gm)
            install(masked, {**before, **masks})
        else:
            masked = model if returns == "inplace" else duplicate(source)
            install(masked, {**before, **masks}, direct=direct)
    return Prepared(masked, graph, budget)
