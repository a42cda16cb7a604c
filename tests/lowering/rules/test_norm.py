"""Norms: the axes of their statistics, whoever spells them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.graph import ir

IMAGE, TOKENS = torch.ones(2, 4, 6, 6), torch.ones(2, 3, 4)


class Around(nn.Module):
    """A layer before and after, so that the norm stands amid paths."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1) if x.dim() == 4 else nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def norms(function: Callable[[Tensor], Tensor], x: Tensor) -> list[ir.Norm]:
    graph = fxprune.lower(fxprune.capture(Around(function, x).eval(), x), strict=True)
    assert not graph.opaque
    return [op for op in graph.ops if isinstance(op, ir.Norm)]


BY_MODULE: dict[str, tuple[nn.Module, Tensor, tuple[int, ...], int, bool]] = {
    "batch": (nn.BatchNorm2d(4), IMAGE, (), 1, True),
    "batch without running statistics": (
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        IMAGE,
        (0, 2, 3),
        1,
        False,
    ),
    "layer": (nn.LayerNorm(4), TOKENS, (2,), 1, True),
    "layer over two axes": (nn.LayerNorm((3, 4)), TOKENS, (1, 2), 1, True),
    "layer without parameters": (nn.LayerNorm(4, elementwise_affine=False), TOKENS, (2,), 1, False),
    "rms": (nn.RMSNorm(4), TOKENS, (2,), 1, False),
    "group": (nn.GroupNorm(2, 4), IMAGE, (1, 2, 3), 2, True),
    "instance": (nn.InstanceNorm2d(4, affine=True), IMAGE, (2, 3), 1, True),
    "instance with running statistics": (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE, (), 1, False),
    "local response": (nn.LocalResponseNorm(3), IMAGE, (1,), 1, False),
}


@pytest.mark.parametrize("name", BY_MODULE)
def test_modules(name: str) -> None:
    module, x, axes, groups, bias = BY_MODULE[name]
    (op,) = norms(module, x)
    assert (op.axes, op.groups, op.bias) == (axes, groups, bias)
    assert op.eps == getattr(module, "eps", None)


one, zero = torch.ones(4), torch.zeros(4)
BY_FUNCTION: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, tuple[int, ...], int, bool]] = {
    "batch": (lambda x: F.batch_norm(x, zero, one, one, None), IMAGE, (), 1, False),
    "aten batch": (
        lambda x: torch.batch_norm(x, one, None, zero, one, False, 0.1, 1e-5, False),
        IMAGE,
        (),
        1,
        False,
    ),
    "instance": (lambda x: F.instance_norm(x, weight=one, bias=zero), IMAGE, (2, 3), 1, True),
    "aten instance": (
        lambda x: torch.instance_norm(x, one, zero, None, None, True, 0.1, 1e-5, False),
        IMAGE,
        (2, 3),
        1,
        True,
    ),
    "aten instance with running statistics": (
        lambda x: torch.instance_norm(x, one, None, zero, one, False, 0.1, 1e-5, False),
        IMAGE,
        (),
        1,
        False,
    ),
    "layer": (lambda x: F.layer_norm(x, [4], bias=zero), TOKENS, (2,), 1, True),
    "rms": (lambda x: F.rms_norm(x, [4]), TOKENS, (2,), 1, False),
    "group": (lambda x: F.group_norm(x, 4, one, zero), IMAGE, (1, 2, 3), 4, True),
    "local response": (lambda x: F.local_response_norm(x, 3), IMAGE, (1,), 1, False),
    "length": (lambda x: F.normalize(x, dim=-1), TOKENS, (2,), 1, False),
}


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_functions(name: str) -> None:
    function, x, axes, groups, bias = BY_FUNCTION[name]
    (op,) = norms(function, x)
    assert (op.axes, op.groups, op.bias) == (axes, groups, bias)


EPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "batch": (lambda x: F.batch_norm(x, zero, one), IMAGE),
    "instance": (lambda x: F.instance_norm(x), IMAGE),
    "layer": (lambda x: F.layer_norm(x, [4]), TOKENS),
    "group": (lambda x: F.group_norm(x, 2), IMAGE),
}


@pytest.mark.parametrize("name", EPS)
def test_functions_add_what_torch_adds_to_a_variance_by_default(name: str) -> None:
    function, x = EPS[name]
    (op,) = norms(function, x)
    assert op.eps == 1e-5


def global_response(x: Tensor) -> Tensor:
    """The norm of ConvNeXt V2: the length of every channel, divided by the mean length of all."""
    length = x.norm(dim=(2, 3), keepdim=True)
    return x * (length / (length.mean(1, keepdim=True) + 1e-6))


def moments(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=1, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


BY_HAND: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, list[tuple[int, ...]]]] = {
    "centred": (lambda x: x - x.mean(1, keepdim=True), IMAGE, [(1,)]),
    "centred, reversed": (lambda x: x.mean(1, keepdim=True) - x, IMAGE, [(1,)]),
    "rsub": (lambda x: torch.rsub(x, x.mean(1, keepdim=True)), IMAGE, [(1,)]),
    "less twice its mean": (lambda x: torch.sub(x, x.mean(1, keepdim=True), alpha=2), IMAGE, []),
    "and its mean": (lambda x: x + x.mean(1, keepdim=True), IMAGE, []),
    "at least its mean": (lambda x: torch.maximum(x, x.mean(1, keepdim=True)), IMAGE, []),
    "rms": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), TOKENS, [(2,)]),
    "rms by division": (lambda x: x / (x * x).mean(-1, keepdim=True).sqrt(), TOKENS, [(2,)]),
    "length": (lambda x: x / x.norm(dim=1, keepdim=True), IMAGE, [(1,)]),
    "length of positions": (lambda x: x / x.norm(dim=(2, 3))[:, :, None, None], IMAGE, [(2, 3)]),
    "moments": (moments, IMAGE, [(1,), (1,)]),
    "global response": (global_response, IMAGE, [(1, 2, 3)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_written_by_hand(name: str) -> None:
    function, x, axes = BY_HAND[name]
    assert [op.axes for op in norms(function, x)] == axes


def maps(function: Callable[[Tensor], Tensor], x: Tensor) -> list[ir.Map]:
    graph = fxprune.lower(fxprune.capture(Around(function, x), x), strict=True)
    return [op for op in graph.ops if isinstance(op, ir.Map)]


SOFTMAX: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, tuple[int, ...]]] = {
    "function": (lambda x: x.softmax(-1), TOKENS, (2,)),
    "keyword": (lambda x: torch.softmax(x, dim=1), TOKENS, (1,)),
    "module": (nn.LogSoftmax(1), IMAGE, (1,)),
    "of channels": (nn.Softmax2d(), IMAGE, (1,)),
    "gumbel": (lambda x: F.gumbel_softmax(x), IMAGE, (3,)),
    "elementwise": (torch.sigmoid, IMAGE, ()),
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_softmax_names_the_axis_that_it_sums_along(name: str) -> None:
    function, x, axes = SOFTMAX[name]
    assert [op.axes for op in maps(function, x)] == [axes]


def test_attention_is_a_softmax_over_keys() -> None:
    (op,) = maps(lambda x: F.scaled_dot_product_attention(x, x, x), TOKENS)
    assert op.axes == (2,)
    assert op.node == "scaled_dot_product_attention"
