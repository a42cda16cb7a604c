"""Rules of products and contractions: every spelling against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture import capture
from fxprune.graph import ir
from fxprune.lowering import lower, matrices_outside
from lowering.agreement import lowered
from lowering.wrapped import check, check_against

TOKENS = (5, 8)
IMAGE = (4, 4, 5)

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gram of channels": lambda x: torch.einsum("bnc,bnd->bcd", x, x),
    "gram of positions": lambda x: torch.einsum("bnc,bmc->bnm", x, x),
    "dot per position": lambda x: torch.einsum("bnc,bnc->bn", x, x),
    "ellipsis": lambda x: torch.einsum("...nc,...mc->...nm", x, x),
    "ellipsis of another rank": lambda x: torch.einsum("...c,c->...", x, torch.ones(8)),
    "no arrow": lambda x: torch.einsum("...nc,...cm", x, x.transpose(1, 2)),
    "one operand": lambda x: torch.einsum("bnc->bcn", x),
    "one operand, summed": lambda x: torch.einsum("bnc->bc", x),
    "spaces": lambda x: torch.einsum("b n c, b m c -> b n m", x, x),
    "a list": lambda x: torch.einsum("bnc,bmc->bnm", [x, x]),
    "a constant that selects": lambda x: torch.einsum("bnc,cd->bnd", x, torch.eye(8)[:, ::3]),
    "outer": lambda x: torch.einsum("bc,bd->bcd", x[:, 0], x[:, 1]),
    "broadcast": lambda x: torch.einsum("bnc,bmc->bnm", x[:, :1], x),
    "matmul": lambda x: x @ x.transpose(-2, -1),
    "matmul, ranks differ": lambda x: x[:, None].matmul(x.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)),
    "matmul, broadcast": lambda x: torch.matmul(x.unsqueeze(2), x.unsqueeze(1).transpose(-2, -1)),
    "matmul with a vector": lambda x: x @ torch.ones(8),
    "constant on the left": lambda x: torch.ones(3, 5) @ x,
    "constant that selects, on the left": lambda x: torch.eye(5)[1:3] @ x,
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "F.linear by a value": lambda x: F.linear(x, x.mean(0)),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2),
    "baddbmm without its first": lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0),
    "baddbmm by name": lambda x: torch.baddbmm(x @ x.mT, batch2=x.mT, batch1=x, beta=0.5, alpha=2),
    "addmm by name": lambda x: torch.addmm(mat2=torch.eye(8), mat1=x[:, 0], input=x[:, 1]),
    "matmul by name": lambda x: torch.matmul(x, other=x.mT),
    "where by name": lambda x: torch.where(torch.ones(8) > 0, input=x, other=x.flip(1)),
    "addmm of a constant": lambda x: torch.addmm(torch.ones(8), x[:, 0], torch.ones(8, 8)),
    "tensordot": lambda x: torch.tensordot(x, torch.eye(8)[:, :3], dims=1),
    "tensordot by axes": lambda x: torch.tensordot(x, torch.eye(5)[:, :3], dims=([1], [0])),
    "transposed by name": lambda x: x @ x[:, :3].mT,
    "fft of FNet": lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
    "fft2": lambda x: torch.fft.fft2(x).real,
    "rfft and back": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1),
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", PLAIN)
def test_product(name: str) -> None:
    check(PLAIN[name], TOKENS)


def test_product_of_three() -> None:
    """Two at a time: the same weights are effective (how a product of three counts is a matter of order)."""
    check(lambda x: torch.einsum("bnc,bmc,bmd->bnd", x, x, x), TOKENS, counts=False)


def test_a_product_of_three_sums_a_letter_as_soon_as_no_later_factor_has_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Triple())
    graph = lowered(model, torch.ones(2, 5, 3))
    shapes = [tuple(op.output.shape) for op in graph.ops if isinstance(op, ir.Mix)]
    assert shapes == [(2, 5, 5), (2, 5, 4)]


class Triple(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,bmc,bmd->bnd", x, x, x)


class GlobalFilter(nn.Module):
    """GFNet: a learnt filter in the frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 3, 4, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        x = x * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(x, s=(4, 5), dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)


def test_global_filter() -> None:
    check(GlobalFilter, IMAGE)


class Reads(nn.Module):
    """The weight of a layer that is never called, read by ``function(x, weight)``."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], out: int, inputs: int) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(inputs, out, bias=False), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer.weight)


READS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, int]] = {
    "F.linear": (lambda x, w: F.linear(x, w), 6, 8),
    "F.linear of a part": (lambda x, w: F.linear(x, w[:3]), 6, 8),
    "matmul": (lambda x, w: x @ w.t(), 6, 8),
    "matmul, transposed by name": (lambda x, w: x @ w.T, 6, 8),
    "matmul, not transposed": (lambda x, w: x @ w, 8, 6),
    "weight on the left": (lambda x, w: w @ x, 3, 5),
    "einsum": (lambda x, w: torch.einsum("bnc,dc->bnd", x, w), 6, 8),
    "einsum, weight first": (lambda x, w: torch.einsum("dc,bnc->bdn", w, x), 6, 8),
    "einsum over positions": (lambda x, w: torch.einsum("bnc,mn->bmc", x, w), 3, 5),
    "einsum, two axes at once": (
        lambda x, w: torch.einsum("bnhc,dhc->bnd", x.unflatten(-1, (2, 4)), w.unflatten(1, (2, 4))), 6, 8),
    "einsum per head": (
        lambda x, w: torch.einsum("bnhc,hdc->bnhd", x.unflatten(-1, (2, 4)), w.unflatten(0, (2, 3))), 6, 4),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), 6, 8),
    "addmm": (lambda x, w: torch.addmm(torch.ones(6), x[:, 0], w.t()), 6, 8),
    "baddbmm": (lambda x, w: torch.baddbmm(x[..., :6], x, w.t().expand(x.shape[0], -1, -1)), 6, 8),
    "as a convolution": (lambda x, w: F.conv1d(x.transpose(1, 2), w[:, :, None]), 6, 8),
    "as a view": (lambda x, w: F.linear(x, w.view(2, 3, 8).transpose(0, 1).reshape(6, 8)), 6, 8),
    "standardised": (lambda x, w: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)), 6, 8),
    "scaled": (lambda x, w: F.linear(x, 0.5 * w), 6, 8),
    "twice": (lambda x, w: F.linear(F.linear(x, w).relu(), w.t()), 6, 8),
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", READS)
def test_weight_read_by_hand(name: str) -> None:
    """A contraction with a prunable parameter is a kernel set, not a mix."""
    function, out, inputs = READS[name]
    check(lambda: Reads(function, out, inputs), TOKENS)


class Own(nn.Module):
    """A parameter of nobody but this module, read by ``function(x, weight)``."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.own, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.own)


OWN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "F.linear": (lambda x, w: F.linear(x, w), (6, 8)),
    "Conv1D of GPT-2": (
        lambda x, w: torch.addmm(torch.ones(6), x.reshape(-1, 8), w).view(*x.shape[:-1], 6), (8, 6)),
    "CLIP's projection": (lambda x, w: x @ w, (8, 6)),
    "matmul in another type": (lambda x, w: torch.matmul(x, w.to(x.dtype)), (8, 6)),
    "XLNet": (lambda x, w: torch.einsum("ibh,hnd->ibnd", x, w).flatten(2), (8, 2, 3)),
    "XLNet, output": (lambda x, w: torch.einsum("ibnd,hnd->ibh", x.unflatten(-1, (2, 4)), w), (6, 2, 4)),
    "LoRA": (lambda x, w: x @ w.T @ w, (2, 8)),
    "one matrix per head": (
        lambda x, w: torch.einsum("bnhc,hcd->bnhd", x.unflatten(-1, (2, 4)), w).flatten(2), (2, 4, 3)),
    "experts side by side": (
        lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (5, 8, 6)),
    "experts, one after the other": (
        lambda x, w: torch.stack([F.linear(x[:, i], w[i]) for i in range(3)], 1), (3, 6, 8)),
    "one product for all experts": (lambda x, w: torch.einsum("bnc,eco->bneo", x, w).sum(2), (3, 8, 6)),
    "baddbmm": (
        lambda x, w: torch.baddbmm(torch.ones(5, 1, 6), x.transpose(0, 1), w).transpose(0, 1), (5, 8, 6)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (8, 6)),
    "mv": (lambda x, w: torch.mv(w, x[0, 0])[None].expand(x.shape[0], -1), (6, 8)),
    "convolution": (lambda x, w: F.conv1d(x.transpose(1, 2), w, padding=1), (6, 8, 3)),
    "transposed convolution": (lambda x, w: F.conv_transpose1d(x.transpose(1, 2), w), (8, 6, 3)),
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", OWN)
def test_own_parameter(name: str) -> None:
    """A parameter that a contraction meets is a kernel set, whatever module owns it."""
    function, shape = OWN[name]
    model = Own(function, *shape)
    assert set(lowered(model, torch.randn(2, *TOKENS)).kernels) == {"own"}
    check(lambda: Own(function, *shape), TOKENS, counts=name not in ("mv",), periodic="conv" not in name)


def test_what_is_no_linear_layer_of_the_parameter() -> None:
    """Zeros of a parameter that is changed first are none in the product; it is named as not prunable."""
    torch.manual_seed(0)
    functions = (
        lambda x, w: x @ w.exp(),
        lambda x, w: x @ (w @ w.T),
        lambda x, w: torch.einsum("bnc,dc->bnd", x[..., :1], w),  # one number for a row
    )
    for function in functions:
        gm = capture(Own(function, 8, 8), torch.randn(2, *TOKENS))
        graph = lower(gm, strict=True)
        assert not graph.kernels
        assert not graph.opaque
        assert matrices_outside(gm, graph) == {"own": 64}


class Conditional(nn.Module):
    """CondConv: experts mixed per sample, the samples side by side as groups."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(3, 6 * 4 * 9) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = torch.sigmoid(self.route(x.mean((2, 3)))) @ self.experts
        weight = weight.view(batch * 6, channels, 3, 3)
        y = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return y.view(batch, 6, height, width)


class Involution(nn.Module):
    """Kernels made at every position, applied to unfolded patches."""

    def __init__(self) -> None:
        super().__init__()
        self.span = nn.Conv2d(4, 2 * 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernels = self.span(x).view(batch, 2, 1, 9, height, width)
        patches = F.unfold(x, 3, padding=1).view(batch, 2, channels // 2, 9, height, width)
        return (kernels * patches).sum(3).view(batch, channels, height, width)


@pytest.mark.parametrize("kind", [Conditional, Involution])
def test_dynamic_convolution(kind: Any) -> None:
    check(kind, IMAGE)


FORMS: dict[str, Any] = {
    "kron": (
        lambda x: torch.stack([torch.kron(y[:2, :3], y[2:, :2]) for y in x.unbind(0)]),
        lambda x: (x[:, :2, None, :3, None] * x[:, 2:, :2][:, None, :, None]).reshape(-1, 4, 6), (4, 6)),
    "multi_dot": (
        lambda x: torch.stack([torch.linalg.multi_dot([y, y.t(), y]) for y in x.unbind(0)]),
        lambda x: x @ x.transpose(1, 2) @ x, (4, 6)),
    "polar": (
        lambda x: torch.view_as_real(torch.polar(x, x.flip(1))).sum(-1),
        lambda x: x * x.flip(1).sigmoid() + x * x.flip(1).sigmoid(), (4, 6)),
    "complex": (
        lambda x: torch.view_as_real(torch.complex(x, x.flip(1))).sum(-1),
        lambda x: x + x.flip(1) + x + x.flip(1), (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_paths_are_those_of_the_plain_form(name: str) -> None:
    check_against(*FORMS[name])
