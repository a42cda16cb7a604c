"""Runs of a circuit against the traversal of the graph, which shares none of its code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lowering.agreement import lowered
from torch import Tensor, nn

from fxprune.graph import ChannelGraph
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow


class Products(nn.Module):
    """A product of a product: where the inner one is present is asked in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 4, bias=False) for _ in range(3))
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.a(x) * self.b(x) * self.c(x))
        return y


class GatedProduct(Products):
    """One of the factors is present everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.sigmoid(self.a(x)) * self.b(x) * self.c(x))
        return y


class Tokens(nn.Module):
    """Layers at several positions that differ: a bias-free attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.first(x).chunk(3, -1))
        y: Tensor = self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def wide() -> nn.Module:
    """So many paths that values are rescaled several times."""
    layers = [layer for _ in range(9) for layer in (nn.Linear(40, 40, bias=False), nn.ReLU())]
    return nn.Sequential(*layers)


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.ConvTranspose2d(8, 6, 3, padding=1, groups=2)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "products": (Products, torch.ones(2, 3)),
    "a product of a gate": (GatedProduct, torch.ones(2, 3)),
    "tokens": (Tokens, torch.ones(2, 3, 4)),
    "wide": (wide, torch.ones(1, 40)),
    "grouped": (grouped, torch.ones(1, 4, 6, 6)),
}


def compiled(model: nn.Module, x: Tensor) -> tuple[ChannelGraph, Circuit]:
    graph = lowered(model, x)
    found = circuit(graph)
    assert found is not None
    return graph, found


def derivative(found: Circuit, name: str, counts: dict[str, Tensor]) -> tuple[float, Tensor]:
    """ln R, and its derivative by the counts of one parameter."""
    result = found.run(counts)
    total = torch.zeros_like(counts[name])
    for place, part in enumerate(found.contractions):
        if part.name == name:
            part.spread(result.slope[place], result.x[place], total, add=True)
    return result.log_total, total


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_run_is_a_traversal(net: str, density: float) -> None:
    make, x = NETS[net]
    graph, found = compiled(make(), x)
    for _ in range(3):
        masks = {name: torch.rand(kernels.shape) < density for name, kernels in graph.kernels.items()}
        live = {name: masks[name] & graph.kernels[name].live_taps for name in masks}
        counts = {name: mask.flatten(2).sum(2) if mask.dim() > 2 else mask for name, mask in live.items()}
        counts = {name: count.double() for name, count in counts.items()}
        want = flow(graph, masks, resolution="channel", dtype=torch.float64)
        for name in masks:
            log_total, slope = derivative(found, name, counts)
            assert log_total == pytest.approx(want.log_total, rel=1e-9)
            by_weight = want.gradients[name]
            taps = live[name].flatten(2).any(2) if masks[name].dim() > 2 else torch.ones_like(masks[name])
            by_count = by_weight.flatten(2).amax(2) if by_weight.dim() > 2 else by_weight
            torch.testing.assert_close(slope * taps, by_count * taps, rtol=1e-9, atol=1e-12)


def test_no_path_at_all() -> None:
    _, found = compiled(Products(), torch.ones(2, 3))
    dense = {name: found.dense(name) for name in found.kernels}
    result = found.run(dense | {"last.weight": torch.zeros_like(dense["last.weight"])})
    assert result.log_total == -math.inf
    assert not any(bool(slope.any()) for slope in result.slope)
    assert found.run(dense).log_total > 0, "what was without paths may have them again"
