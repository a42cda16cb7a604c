"""Networks to compute by hand, ascents at given masks, and the directions of their scores."""

from typing import Any

import torch
from torch import nn

from fxprune.graph import ChannelGraph
from fxprune.methods.dpai.adam_topk import Ascent
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import Objective, ScoreGradients
from fxprune.methods.dpai.weight_gradients import WeightGradients
from fxprune.paths.circuit.compile import circuit
from fxprune.sparsity.masks import Masks, kept

KINDS = ["kernel", "weight"]
OBJECTIVES = [Objective(0, 0), Objective(0.5, 0), Objective(1, 0), Objective(0.5, 1), Objective(0.5, 0.3)]


def stack(*layers: list[list[int]]) -> tuple[nn.Sequential, Masks]:
    """Linear layers without biases with these masks."""
    masks = [torch.tensor(layer).bool() for layer in layers]
    net = nn.Sequential(*(nn.Linear(mask.shape[1], mask.shape[0], bias=False) for mask in masks))
    return net, {f"{place}.weight": mask for place, mask in enumerate(masks)}


class Skip(nn.Module):
    """h = F1 x; y = F3 F2 h + h; out = F4 y, of widths 2-2-(2-2)-1."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2, self.f3, self.f4 = (nn.Linear(2, n, bias=False) for n in (2, 2, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.f1(x)
        return self.f4(self.f3(self.f2(h)) + h)


TOY_M = [[1, 1], [1, 0], [0, 0]], [[1, 1, 1], [0, 0, 1]], [[1, 1]]
TOY_R = {
    "f1.weight": [[1, 1], [1, 1]],
    "f2.weight": [[1, 1], [1, 0]],
    "f3.weight": [[0, 1], [0, 1]],
    "f4.weight": [[1, 1]],
}


def gradients_of(graph: ChannelGraph, objective: Objective, kind: str) -> ScoreGradients:
    if kind == "weight":
        return WeightGradients(graph, list(graph.kernels), {}, objective, "channel", torch.device("cpu"))
    found = circuit(graph)
    assert found is not None
    return KernelGradients(found, list(graph.kernels), {}, objective)


def ascent_at(
    graph: ChannelGraph, masks: Masks, objective: Objective, kind: str, lr: float = 0.005
) -> Ascent:
    """Scores 2 where the masks keep, 1 where they prune."""
    scores = {name: 1.0 + mask.float() for name, mask in masks.items()}
    return Ascent(gradients_of(graph, objective, kind), scores, kept(masks), lr)


def directions(ascent: Ascent) -> dict[str, torch.Tensor]:
    ascent.gradients.evaluate()
    found = {}
    for place, group in enumerate(ascent.groups):
        blocks = range(len(ascent.gradients.blocks(place)))
        whole = torch.cat([ascent.gradients.gradient(place, block).clone() for block in blocks])
        found |= {name: whole[where] for name, where in group.units.items()}
    return found


def assert_direction(masks: Masks, graph: ChannelGraph, kind: str, objective: Objective, *rows: Any) -> None:
    found = directions(ascent_at(graph, masks, objective, kind))
    for (name, direction), row in zip(found.items(), rows, strict=True):
        assert torch.allclose(direction, torch.tensor(row).flatten().float(), atol=1e-6), name


def random_masks(graph: ChannelGraph, density: float, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(own.shape, generator=generator) < density for name, own in graph.kernels.items()}


class Uneven(nn.Module):
    """Branches side by side: at depths of 240, 120 and 1 each has e^300 times the next one's paths."""

    def __init__(self, depths: tuple[int, int, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(depth))) for depth in depths
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([self.branches[1](x), self.branches[2](x)], 1)
        return torch.cat([self.branches[0](x), inner], 1)


def dense_weights(graph: ChannelGraph) -> dict[str, torch.Tensor]:
    return {name: torch.ones(own.shape) for name, own in graph.kernels.items()}
