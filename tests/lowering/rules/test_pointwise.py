"""Rules of elementwise arithmetic, norms and gates: every spelling against the oracle."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach
from lowering.agreement import assert_reach, lowered
from lowering.wrapped import Entries, check

TOKENS = (5, 8)
IMAGE = (4, 4, 5)


def _gated(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gate of one half on the other: where it is never Zero the other passes alone."""
    return lambda x: x[..., :4] * gate(x[..., 4:])


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    name: _gated(function)
    for name, function in {
        "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
        "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish, "softplus": F.softplus, "exp": torch.exp,
        "softmax": lambda x: x.softmax(-1), "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu,
        "mish": F.mish, "cos": torch.cos, "sin": torch.sin, "plus one": lambda x: x + 1,
        "one minus": lambda x: 1 - x, "negative": operator.neg, "clamp": lambda x: x.clamp(-1, 1),
        "clamp from below": lambda x: x.clamp(min=0.1), "square": torch.square, "power": lambda x: x**3,
        "reciprocal": lambda x: 1 / (x + 2), "abs": torch.abs, "sqrt": lambda x: x.abs().sqrt(),
        "log1p": lambda x: torch.log1p(x.abs()), "scaled": lambda x: x * 0.5, "divided": lambda x: x / 3,
        "by a vector": lambda x: x * torch.arange(4.0), "by zeros": lambda x: x * torch.zeros(4) + 0.0,
        "sigmoid in place": lambda x: x.clone().sigmoid_(), 
        "relu in place": lambda x: F.relu(x.clone(), True),
        "softmax of a sum": lambda x: (x + x.flip(1)).softmax(1), "to and back": lambda x: x.double().float(),
        "erf": torch.erf, "logsigmoid": F.logsigmoid,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str) -> None:
    check(GATES[name], TOKENS, kinds=(Entries,))


def test_a_value_times_itself_is_a_square() -> None:
    """One factor's paths, as in ``x.square()``; the same weights are effective."""
    check(lambda x: x[..., :4] * (x * x)[..., 4:], TOKENS, counts=False)


class FixedGate(nn.Module):
    """A gate that no input reaches: ``function`` of a layer that reads a buffer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(3, 4, bias=False), nn.Linear(2, 4, bias=False)
        self.register_buffer("given", torch.ones(2))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.function(self.gate(self.given))
        return y


@pytest.mark.parametrize("function", [F.relu, torch.sigmoid, lambda y: y.maximum(torch.zeros(2, 4))])
def test_a_function_of_what_no_input_reaches(function: Callable[[Tensor], Tensor]) -> None:
    """With rows of zeros in the gate's layer, sigmoid gives one half and relu nothing."""
    model, x = FixedGate(function), torch.ones(2, 3)
    rows = torch.tensor([True, False, True, False])
    assert_reach(lowered(model, x), model, x, {"gate.weight": rows[:, None].expand(4, 2)})


def test_literals_are_read_for_their_numbers() -> None:
    """A tensor that is neither parameter nor buffer: as if it were written in the forward."""
    picks = torch.eye(8)[:, ::3]
    check(lambda x: x @ picks, TOKENS)


def _var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5)


def _moments(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def _std(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


def _root_mean_square(x: Tensor) -> Tensor:
    return x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt()


class Response(nn.Module):
    """ConvNeXt V2's global response normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(p=2, dim=1, keepdim=True)
        scale = length / (length.mean(dim=-1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias, self.weight, x * scale)


class Scale(nn.Module):
    """Layer scale, with a learnt shift that may be zero now."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(8))
        self.beta = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gamma + self.beta) * x.flip(-1)


OTHERS: dict[str, Any] = {
    "var_mean": _var_mean,
    "moments": _moments,
    "std": _std,
    "root mean square": _root_mean_square,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "by its length": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5),
    "global response": lambda: Response(),
    "layer scale": lambda: Scale(),
    "nn.LayerNorm": lambda: nn.LayerNorm(8),
    "nn.LayerNorm without bias": lambda: nn.LayerNorm(8, bias=False),
    "nn.RMSNorm": lambda: nn.RMSNorm(8),
    "nn.BatchNorm1d": lambda: nn.BatchNorm1d(5),
    "F.layer_norm": lambda x: F.layer_norm(x, (8,)),
    "nn.GLU": lambda: nn.GLU(-1),
    "F.glu over tokens": lambda x: F.glu(x[:, :4], 1),
    "glu by hand": lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, -1)),
    "gelu gate by hand": lambda x: (lambda a, b: a * F.gelu(b))(*x.chunk(2, -1)),
    "lerp by a number": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "lerp by a value": lambda x: torch.lerp(x, x.flip(1), x.roll(1, 2)),
    "addcmul": lambda x: torch.addcmul(x, x.flip(1), x.roll(1, 2), value=0.5),
    "addcmul of a constant": lambda x: torch.addcmul(x, x.flip(1), torch.full((8,), 2.0)),
    "a quotient": lambda x: x / (x.flip(1) + 1.0),
    "a quotient without a floor": lambda x: x / x.flip(1),
    "differences": lambda x: (x - x.flip(1)) * (1.0 - x.roll(1, 1)),
    "in place": lambda x: x.clone().mul_(x.flip(1)).add_(x.roll(1, 1)),
    "augmented": lambda x: operator.iadd(x.clone(), x.flip(1)),
    "alpha": lambda x: torch.add(x, x.flip(1), alpha=0.5),
    "rsub": lambda x: torch.rsub(x, x.flip(1)),
    "dropout": lambda: nn.Dropout(0.5),
    "identity": lambda: nn.Identity(),
    "nn.PReLU": lambda: nn.Sequential(nn.PReLU(), nn.LayerNorm(8, elementwise_affine=False)),
    "sums of sums": lambda x: x.sum(1, keepdim=True) * x.mean((1, 2), keepdim=True) * x,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_arithmetic(name: str) -> None:
    check(OTHERS[name], TOKENS)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.LocalResponseNorm(2),
        lambda: nn.Dropout2d(0.3),
    ],
)
def test_norms_of_images(layer: Callable[[], nn.Module]) -> None:
    check(lambda: nn.Sequential(layer(), nn.Conv2d(4, 3, 1, bias=False)), IMAGE, kinds=(Entries,))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x.mean(1, keepdim=True),
        lambda x: torch.maximum(x, x.mean(1, keepdim=True)),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.mean(1, keepdim=True) - x,
    ],
)
def test_means_that_are_subtracted_alone_are_no_paths(function: Callable[[Tensor], Tensor]) -> None:
    check(function, TOKENS)


def test_a_choice_that_depends_on_the_input_takes_both_sides() -> None:
    """``where(x > 0, a, b)``: either side may be chosen, so the weights of both are effective."""

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asked, self.left, self.right = (nn.Linear(3, 3, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(self.asked(x) > 0, self.left(x), self.right(x))

    graph = lower(capture(Choice(), torch.ones(2, 3)), strict=True)
    assert not graph.opaque
    left = torch.eye(3, dtype=torch.bool)
    found = reach(graph, {"left.weight": left})
    assert torch.equal(found["left.weight"], left)
    assert bool(found["right.weight"].all())


@pytest.mark.parametrize(
    "quantised",
    [
        lambda x: torch.where(x > 0, torch.ones_like(x), -torch.ones_like(x)),
        lambda x: torch.where(x > 0, 1.0, 0.0),
        lambda x: (x * 255).byte().float() / 255,
    ],
)
def test_a_step_between_constants_is_a_path(quantised: Callable[[Tensor], Tensor]) -> None:
    """A hard quantiser passes on something of its input: the layers around it have paths."""

    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.before(x)
            y: Tensor = self.after(quantised(z))
            return y, z.square().sum()

    torch.manual_seed(0)
    model, x = Binary(), torch.randn(5, 4)
    graph = lower(capture(model, x), strict=True)
    assert not graph.opaque
    dead = torch.ones(6, 4, dtype=torch.bool)
    dead[2] = False
    found = reach(graph, {"before.weight": dead})
    assert bool(found["after.weight"].any())
    masks = fxprune.masks(fxprune.apply(model, "synflow", 0.5, example_inputs=x, progress=False))
    assert all(bool(mask.any()) for mask in masks.values())
    pruned = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False
    ).eval()
    small = fxprune.compact(pruned, example_inputs=x).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(x), pruned(x))


class Attends(nn.Module):
    """Attention under a mask that comes with the input."""

    def __init__(self, shut: float) -> None:
        super().__init__()
        self.qkv, self.last, self.shut = nn.Linear(4, 12), nn.Linear(4, 2), shut

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        bias = torch.where(mask > 0, 0.0, self.shut)
        y: Tensor = self.last(((q @ k.transpose(-2, -1)) + bias[:, None]).softmax(-1) @ v)
        return y


@pytest.mark.parametrize("shut", [-math.inf, -1e9, float(torch.finfo(torch.float32).min)])
def test_a_mask_of_attention_is_no_path(shut: float) -> None:
    torch.manual_seed(0)
    model, x, mask = Attends(shut), torch.randn(2, 5, 4), torch.ones(2, 5)
    found = fxprune.apply(model, "synflow", 0.5, example_inputs=(x, mask), progress=False)
    plain = Attends(shut)
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda x, mask: Attends.forward(plain, x, torch.ones(2, 5))  # type: ignore[method-assign]
    constant = fxprune.apply(plain, "synflow", 0.5, example_inputs=(x, mask), progress=False)
    masks = fxprune.masks(constant)
    assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(found).items())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[..., :4] * torch.where(x[..., 4:] == 0, 0.0, 1.0),
        lambda x: x * (x > 0).float(),
        lambda x: x * torch.sign(x),
        lambda x: x.masked_fill(x < 0, -math.inf).softmax(-1) @ torch.ones(8, 8),
        lambda x: torch.minimum(x, torch.ones(8)) * x,
        lambda x: x.topk(2, dim=-1).values,
        lambda x: x.sort(-1)[0],
        lambda x: x.std(1),
    ],
)
def test_questions_about_numbers_are_never_too_strict(function: Callable[[Tensor], Tensor]) -> None:
    """A choice by numbers lets through all that it might, opaque or not: each entry stays effective."""
    torch.manual_seed(0)
    model = Entries(function, TOKENS)
    graph = lower(capture(model, model.example()), strict=True)
    before = torch.ones(40, 4, dtype=torch.bool)
    found = reach(graph, {"before.weight": before})["before.weight"]
    assert bool(found.any()) or not bool(function(torch.ones(1, 5, 8)).any())
