"""Scales of norms: channels that the norm behind them scales down go first."""

from __future__ import annotations

import warnings

import torch

from fxprune.channels.entries import entry_groups
from fxprune.channels.groups import group_channels
from fxprune.graph import ir
from fxprune.scoring.contract import Method, Problem, Scores, by_rows, from_scores
from fxprune.sparsity.masks import Masks


def bn_scale() -> Method:
    """Network slimming (Liu, Li, Shen, Huang, Yan, Zhang 2017, arXiv 1708.06519).

    Score of an output channel: the mean ``|gamma|`` of the norms that scale it, shared by all its weights.
    Channels that no norm scales have the largest score and go last. Meant for ``granularity="channel"``, and
    for networks that were trained with a penalty on the scales; at initialisation all scales are equal.
    Needs nothing. Warns where no norm scales a channel that can go: then magnitudes are taken.

    Cost: one pass over the norms.
    When: for channels of networks that were trained with a penalty on the scales of their norms.
    """
    return Method(
        name="bn-scale",
        find=by_rows(from_scores(_scales, name="bn-scale")),
        summary="keeps the channels that the norms behind them scale up",
        paper="Liu et al. 2017, arXiv 1708.06519",
        reads_only=True,
    )


def _scales(problem: Problem, masks: Masks) -> Scores:
    groups = group_channels(problem.graph)
    parameters = dict(problem.model.named_parameters())
    names = _scale_names(problem, parameters)
    total = torch.zeros(groups.count + 1, dtype=torch.float64)
    number = torch.zeros_like(total)
    for name, by_axis in entry_groups(
        groups, {name: tuple(parameters[name].shape) for name in names}
    ).items():
        numbers = by_axis.get(0)
        if numbers is not None and parameters[name].dim() == 1:
            total.index_add_(0, numbers % (groups.count + 1), parameters[name].detach().abs().double().cpu())
            number.index_add_(0, numbers % (groups.count + 1), torch.ones(len(numbers), dtype=torch.float64))
    total[-1] = number[-1] = 0  # what cannot go
    if not bool(number.any()):
        message = "method 'bn-scale': no norm scales a channel that can go, so magnitudes are taken"
        warnings.warn(message, stacklevel=2)
        return {name: weight.abs() for name, weight in problem.weights.items()}
    scale = total / number.clamp(min=1)
    scale = scale.where(number > 0, 2 * scale.max())
    scores = {}
    for name, weight in problem.weights.items():
        dtype = weight.dtype.to_real()
        if name in groups.rows:
            score = scale[groups.by_weight(name)[0]].to(weight.device, dtype)
        else:
            score = scale.max().to(weight.device, dtype)
        scores[name] = score.expand(weight.shape).contiguous()
    return scores


def _scale_names(problem: Problem, parameters: dict[str, torch.nn.Parameter]) -> list[str]:
    """The first parameter of every norm of the graph."""
    found = []
    for op in problem.graph.ops:
        if isinstance(op, ir.Norm):
            own = [use.name for use in op.params if use.name in parameters]
            found += own[:1]
    return list(dict.fromkeys(found))
