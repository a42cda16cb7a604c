"""Matrix weights that the graph has no kernels of are named, and pruned by what needs no paths."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.lowering import hidden_layers, lower, matrices_outside


class Modulated(nn.Module):
    """A convolution whose weights are scaled by sample, as StyleGAN's are; a scale of rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.style, self.head = nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Conv2d(6, 2, 1)
        self.weight = nn.Parameter(torch.randn(1, 6, 8, 3, 3) / 8)
        self.gain = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        style, x = self.style(x.mean((2, 3))), self.stem(x).relu()
        b, c, h, w = x.shape
        weight = self.weight * style.view(b, 1, c, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        x = F.conv2d(x.view(1, b * c, h, w), weight.view(b * 6, c, 3, 3), groups=b)
        y: Tensor = self.head((x.view(b, 6, *x.shape[2:]) * self.gain).relu())
        return y


def test_weights_that_are_scaled_by_sample_are_pruned() -> None:
    torch.manual_seed(0)
    model, x = Modulated(), torch.randn(2, 3, 8, 8)
    gm = fxprune.capture(model, x)
    graph = lower(gm)
    assert matrices_outside(gm, graph) == {"weight": 432}
    assert list(hidden_layers(gm, graph)) == ["weight"]
    pruned = fxprune.apply(model, "magnitude", 0.8, example_inputs=x, progress=False)
    masks, masked = fxprune.masks(pruned), copy.deepcopy(model)
    assert int(masks["weight"].sum()) < 0.4 * 432
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
    assert torch.equal(masked(x), pruned(x))
    fxprune.verify(pruned)


class WholeWithBuffers(nn.Module):
    """Stays whole, for it asks for numbers; it reads buffers, of its own and of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("table", torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x @ self.table))
        return -x if float(x.detach().sum()) > 1e9 else x


def test_buffers_of_a_module_that_stays_whole_are_no_weights() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), WholeWithBuffers(), nn.Linear(4, 2)), torch.randn(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it stays whole
        gm = fxprune.capture(model, x)
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    assert list(hidden_layers(gm, lower(gm))) == ["1.layer.weight"]
    assert set(fxprune.masks(pruned)) == {"0.weight", "1.layer.weight", "2.weight"}


class Relative(nn.Module):
    """Attention with a table of relative positions, which is resized and multiplied with the queries."""

    def __init__(self, resized: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.table, self.resized = nn.Parameter(torch.randn(9, 6)), resized

    def forward(self, x: Tensor) -> Tensor:
        n, table = x.shape[1], self.table
        if self.resized:
            table = F.interpolate(table.t()[None], size=2 * n - 1, mode="linear")[0].t()
        positions = torch.arange(n)[:, None] - torch.arange(n)[None] + n - 1
        query, key = self.query(x), self.key(x)
        scores = query @ key.transpose(1, 2) + torch.einsum("bqc,qkc->bqk", query, table[positions])
        y: Tensor = scores.softmax(-1) @ self.value(x)
        return y


@pytest.mark.parametrize("resized", [False, True])
def test_tables_of_positions_that_queries_multiply_are_pruned(resized: bool) -> None:
    torch.manual_seed(0)
    model, x = Relative(resized), torch.randn(2, 7 if resized else 5, 6)
    gm = fxprune.capture(model, x)
    assert list(hidden_layers(gm, lower(gm))) == ["table"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    masks, masked = fxprune.masks(pruned), copy.deepcopy(model)
    assert 0 < int(masks["table"].sum()) < 54
    assert sum(int(mask.sum()) for mask in masks.values()) == 81
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
    assert torch.equal(masked(x), pruned(x))
    fxprune.verify(pruned)
    with pytest.warns(UserWarning, match="33% of the 162 matrix weights cannot be pruned.*table"):
        fxprune.apply(model, "synflow", 0.5, example_inputs=x, progress=False)


class Wired(nn.Module):
    """Multiplies its weight with a wiring that is a parameter, but is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.wiring = nn.Parameter(torch.ones(8, 6).tril(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.linear(x, self.layer.weight * self.wiring, self.layer.bias).relu())
        return y


def test_weights_under_a_mask_that_is_a_parameter_are_pruned() -> None:
    torch.manual_seed(0)
    model, x = Wired(), torch.randn(4, 6)
    gm = fxprune.capture(model, x)
    graph = lower(gm)
    assert graph.kernels.keys() == {"layer.weight", "last.weight"}
    assert matrices_outside(gm, graph) == {}
    for method in ("magnitude", "synflow"):
        pruned = fxprune.apply(model, method, 0.5, example_inputs=x, progress=False)
        masks, masked = fxprune.masks(pruned), copy.deepcopy(model)
        assert masks.keys() == graph.kernels.keys()
        with torch.no_grad():
            for name, mask in masks.items():
                masked.get_parameter(name).mul_(mask)
        assert torch.equal(masked(x), pruned(x))
        fxprune.verify(pruned)
    pruned = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False
    ).eval()
    small = fxprune.compact(pruned, example_inputs=x).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(x), pruned(x))


class Gate(nn.Module):
    """Asks its numbers, so that nothing in it has a path; one of them is a buffer."""

    least: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("least", torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * 2 if bool(y.max() > self.least) else y + self.least


@pytest.mark.filterwarnings("ignore:capture. 1 .Gate. kept whole")
def test_parts_without_paths_may_hold_buffers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), Gate(), nn.Linear(6, 2)), torch.randn(3, 4)
    gm = fxprune.capture(model, x)
    graph = lower(gm)
    assert any(use.name == "1.least" for op in graph.opaque for use in op.params)
    assert list(hidden_layers(gm, graph)) == ["1.layer.weight"]
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    assert fxprune.masks(pruned).keys() == {"0.weight", "1.layer.weight", "2.weight"}


class NoChannels(nn.Module):
    """Squeezes its channels to none, as some do that divide a width by a factor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.c, self.kind = nn.Linear(6, 8), nn.Linear(8, 3), kind
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is drawn
            self.squeeze, self.excite = nn.Linear(8, 0), nn.Linear(0, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.kind == "opaque":
            y = torch.from_numpy(y.detach().numpy()) if y.max() > 100 else y
        return self.c(y + self.excite(self.squeeze(y)))


@pytest.mark.parametrize("kind", ["graph", "opaque"])
@pytest.mark.parametrize("budget", ["global", "erk"])
@pytest.mark.filterwarnings("ignore:NoChannels cannot be captured")
def test_layers_of_no_channels_have_no_weights(kind: str, budget: Any) -> None:
    torch.manual_seed(0)
    model, x = NoChannels(kind), torch.randn(4, 6)
    returns: Any = "graph" if kind == "graph" else "module"
    pruned = fxprune.apply(model, "magnitude", 0.5, budget=budget, example_inputs=x, returns=returns)
    masks = fxprune.masks(pruned)
    assert masks.keys() == {"a.weight", "c.weight"}
    assert sum(int(mask.sum()) for mask in masks.values()) == 36
    fxprune.verify(pruned)
    if kind == "graph":
        pruned = fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x).eval()
        small = fxprune.compact(pruned, example_inputs=x)
        torch.testing.assert_close(small(x), pruned(x))


class OfRelations(nn.Module):
    """Has matrices of its own, one for each relation, and asks numbers how many rows there are of each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 6) * 0.3)
        self.scale = nn.Parameter(torch.ones(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        kinds, y = (x[:, 0] * 0).long(), torch.zeros_like(x)
        for kind in range(int(kinds.max()) + 1):
            y = y + torch.where((kinds == kind)[:, None], x @ self.weight[kind], 0.0)
        return y * self.scale[0]


@pytest.mark.filterwarnings("ignore:.*kept whole")
def test_own_weights_of_a_module_that_stays_whole_are_pruned() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), OfRelations(), nn.Linear(6, 2)), torch.randn(4, 6)
    gm = fxprune.capture(model, x)
    graph, state = fxprune.lower(gm), torch.get_rng_state()
    assert list(hidden_layers(gm, graph)) == ["1.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    masks = fxprune.masks(pruned)
    zeroed = copy.deepcopy(model)
    for name, mask in masks.items():
        zeroed.get_parameter(name).data.mul_(mask)
        pruned.get_parameter(name).data += 3.0 * ~mask
    assert "1.weight" in masks
    torch.testing.assert_close(pruned(x), zeroed(x))


class TurnedPositions(nn.Module):
    """Attends to positions that a weight of its own turns: a product of constants with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.turn = nn.Parameter(torch.randn(6, 6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # stays whole
        places = torch.linspace(-1, 1, x.shape[1] * 6).view(x.shape[1], 6)
        keys = torch.einsum("kc,cd->kd", places.type(self.turn.dtype), self.turn)
        y: Tensor = (self.query(x) @ keys.t()).softmax(-1) @ self.value(x)
        return y


@pytest.mark.filterwarnings("ignore:capture")
@pytest.mark.parametrize("inside", [False, True])
def test_weights_that_turn_constants_are_pruned(inside: bool) -> None:
    torch.manual_seed(0)
    model, x = TurnedPositions(), torch.randn(2, 5, 6)
    whole = nn.Sequential(model, nn.Linear(6, 3)) if inside else model
    pruned = fxprune.apply(whole, "magnitude", 0.5, example_inputs=x, progress=False)
    masks, masked = fxprune.masks(pruned), copy.deepcopy(whole)
    name = "0.turn" if inside else "turn"
    assert 0 < int(masks[name].sum()) < 36
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
    assert torch.allclose(masked(x), pruned(x))


class Solves(nn.Module):
    """Multiplies with the inverse of a parameter, which it never makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.matrix, self.offset = nn.Parameter(torch.eye(8) * 4), nn.Parameter(torch.ones(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.linalg.solve(self.matrix, self.first(x).t() + self.offset).t())
        return y


def test_matrices_of_equations_are_named() -> None:
    gm = fxprune.capture(Solves(), torch.randn(5, 6))
    assert matrices_outside(gm, lower(gm)) == {"matrix": 64}
    with pytest.warns(UserWarning, match=r"47% of the 136 matrix weights cannot be pruned.*matrix \(64\)"):
        fxprune.apply(Solves(), "magnitude", 0.5, example_inputs=torch.randn(5, 6), progress=False)


class NoisyLinear(nn.Module):
    """Adds noise to its weight in training, as large as another parameter says."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(outputs, inputs) * 0.1)
        self.noise = nn.Parameter(torch.full((outputs, inputs), 0.02))
        self.register_buffer("drawn", torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.mean + self.noise * self.drawn if self.training else self.mean)


def test_weights_that_training_alone_reads_are_named() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), NoisyLinear(32, 4)), torch.randn(3, 8)
    with pytest.warns(UserWarning, match=r"25% of the 512 matrix weights cannot be pruned.*2\.noise \(128\)"):
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    assert set(fxprune.masks(pruned)) == {"0.weight", "2.mean"}
    assert fxprune.analyze(pruned, example_inputs=x).outside == {"2.noise": 128}
