"""Problems for PX, the activity of their outputs, and a small network."""

from typing import Any

import torch
from torch import nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.px.output_activity import output_activities
from fxprune.scoring.data import Batch
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import Masks, dense


def px_problem(
    model: nn.Module, data: Any, sparsity: float = 0.5, masks: Masks | None = None, **fields: Any
) -> Problem:
    """A problem over all kernels of the captured model."""
    inputs = data[0] if isinstance(data, tuple) else data[0][0]
    gm = capture(model, inputs)
    graph = lower(gm)
    weights = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    start = masks or dense(weights)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Problem(
        model=gm,
        graph=graph,
        weights=weights,
        masks=start,
        budget=plan("global", sparsity, shapes),
        data=data,
        **fields,
    )


def activities(asked: Problem, masks: Masks | None = None) -> list[torch.Tensor]:
    found = output_activities(asked, masks or asked.masks, [Batch(*asked.data)])
    return [each.values * 2.0**each.power for each in found]


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
