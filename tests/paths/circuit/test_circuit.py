"""Runs of a circuit against the traversal of the graph, which shares none of its code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lowering.agreement import lowered
from nets import NETS, WITHOUT_CIRCUIT, lowered_net
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
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


class MadeKernel(nn.Module):
    """A constant image under a kernel that a layer makes: its first and last rows are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.last = nn.Linear(3, 6, bias=False), nn.Conv2d(6, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x)[:, :, None, None, None].expand(-1, -1, -1, 3, 3).flatten(0, 1)
        image = F.conv2d(torch.ones(1, len(x), 4, 4), kernel, padding=1, groups=len(x))
        y: Tensor = self.last(image.view(len(x), 6, 4, 4))
        return y


def wide() -> nn.Module:
    """So many paths that values are rescaled several times."""
    layers = [layer for _ in range(9) for layer in (nn.Linear(40, 40, bias=False), nn.ReLU())]
    return nn.Sequential(*layers)


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.ConvTranspose2d(8, 6, 3, padding=1, groups=2)
    )


OWN_NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "products": (Products, torch.ones(2, 3)),
    "a product of a gate": (GatedProduct, torch.ones(2, 3)),
    "tokens": (Tokens, torch.ones(2, 3, 4)),
    "a made kernel": (MadeKernel, torch.ones(2, 3)),
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


@pytest.mark.parametrize("net", OWN_NETS)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_run_is_a_traversal(net: str, density: float) -> None:
    make, x = OWN_NETS[net]
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


@pytest.mark.parametrize("name", NETS)
def test_a_circuit_counts_what_the_interpreter_counts(name: str) -> None:
    graph = lowered_net(name)
    found = circuit(graph)
    assert (found is None) == (name in WITHOUT_CIRCUIT)
    if found is None:
        return
    for density in (0.9, 0.3, 0.05):
        masks = {name: torch.rand(own.shape) < density for name, own in graph.kernels.items()}
        expected = flow(
            graph, {n: m.double() for n, m in masks.items()}, resolution="channel", dtype=torch.float64
        )
        live = {n: m & graph.kernels[n].live_taps if m.dim() > 2 else m for n, m in masks.items()}
        counts = {n: m.flatten(2).sum(2).double() if m.dim() > 2 else m.double() for n, m in live.items()}
        result = found.run(counts)
        assert result.log_total == pytest.approx(expected.log_total, abs=1e-10)
        gradients = {n: torch.zeros_like(c) for n, c in counts.items()}
        for op, x, slope in zip(found.contractions, result.x, result.slope, strict=True):
            op.spread(slope, x, gradients[op.name], add=True)
        for n, gradient in expected.gradients.items():
            reference = gradient.flatten(2).amax(2) if gradient.dim() > 2 else gradient
            assert torch.allclose(gradients[n], reference, rtol=1e-9, atol=1e-12), n


@pytest.mark.parametrize("name", NETS)
def test_a_circuit_carries_flow_as_the_interpreter_does(name: str) -> None:
    """Average pooling averages, and products take the geometric mean, unless only one factor has paths."""
    graph = lowered_net(name)
    found = circuit(graph, pool="mean", products="mean")
    sums = circuit(graph)
    assert found is None or sums is not None
    generator = torch.Generator().manual_seed(1)
    sizes = {n: torch.rand(own.shape, generator=generator).double() for n, own in graph.kernels.items()}
    expected = flow(graph, sizes, resolution="channel", pool="mean", products="mean", dtype=torch.float64)
    if found is None:
        # That of ``"each"``, where there is one, would give something else.
        each = flow(graph, sizes, resolution="channel", pool="mean", dtype=torch.float64)
        assert sums is None or each.log_total != pytest.approx(expected.log_total, abs=1e-6)
        return
    live = {n: w * graph.kernels[n].live_taps if w.dim() > 2 else w for n, w in sizes.items()}
    result = found.run({n: w.flatten(2).sum(2) if w.dim() > 2 else w for n, w in live.items()})
    assert result.log_total == pytest.approx(expected.log_total, abs=1e-10)


def test_a_circuit_of_many_outputs_keeps_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their sum is beyond the band of a single value.
    wide = nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 4096))
    found = circuit(lower(capture(wide, torch.ones(4, 4))))
    assert found is not None
    counts = {name: found.dense(name) * 2.0**8 for name in found.kernels}
    calls = 0
    calibrate = Circuit._calibrate

    def counted(self: Circuit) -> None:
        nonlocal calls
        calls += 1
        calibrate(self)

    monkeypatch.setattr(Circuit, "_calibrate", counted)
    for _ in range(3):
        assert found.run(counts).log_total == pytest.approx(math.log(4 * 4096**2) + 16 * math.log(2))
    assert calls == 1


@pytest.mark.slow
def test_a_circuit_of_any_depth() -> None:
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(400)))  # R = 64^401, about e^1668
    graph = lower(capture(deep, torch.ones(1, 64)))
    found = circuit(graph)
    assert found is not None
    result = found.run({name: found.dense(name) for name in found.kernels})
    assert result.log_total == pytest.approx(401 * math.log(64))
    op, x, slope = found.contractions[200], result.x[200], result.slope[200]
    gradient = torch.zeros(64, 64, dtype=torch.float64)
    op.spread(slope, x, gradient, add=False)
    assert torch.allclose(gradient, torch.full_like(gradient, 64.0**-2))
    # Thinned by far from one run to the next, and cut: no overflow, no NaN.
    thin = {name: torch.eye(64, dtype=torch.float64) for name in found.kernels}
    assert found.run(thin).log_total == pytest.approx(math.log(64))
    thin["7.weight"] = torch.zeros(64, 64, dtype=torch.float64)
    cut = found.run(thin)
    assert cut.log_total == -math.inf
    assert not any(bool(part.any()) for part in cut.slope)
