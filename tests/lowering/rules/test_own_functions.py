"""A user's own autograd functions."""

from __future__ import annotations

from typing import Any

import torch
from oracle import effective_parameters, random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune import apply, compact
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach
from lowering.agreement import lowered


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        return x / by

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] / 2, None


class Shares(Halve):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        return x.abs() / x.abs().amax(-1, keepdim=True)


class Root(Halve):
    """No number for negative ones, as logarithms and square roots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        return torch.sqrt(x)


class RootOfMean(Halve):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.by, ctx.wanted = by, ctx.needs_input_grad[0]
        ctx.mark_non_differentiable(x.mean())
        ctx.set_materialize_grads(False)
        return torch.sqrt(x) * x.mean(-1, keepdim=True)


class InPlace(Halve):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.mark_dirty(x)
        return x.cumsum_(-1)


class Kept(Halve):
    """Keeps what its gradient needs in a function of its own."""

    @staticmethod
    def forward(x: Tensor, by: float) -> Tensor:  # type: ignore[override]
        return x.cumsum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])


class Convolves(torch.autograd.Function):
    """A convolution with a mean beside it: two results of three tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1), x.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        padded = (x.shape, weight, gradients[0], 1, 1)
        grad_x = torch.nn.grad.conv2d_input(*padded) + gradients[1][:, :, None, None] / x[0, 0].numel()
        grad_w = torch.nn.grad.conv2d_weight(x, weight.shape, gradients[0], 1, 1)
        return grad_x, grad_w, gradients[0].sum((0, 2, 3))


class Convolution(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.stem, self.own = nn.Conv2d(3, 6, 3, padding=1, bias=False), own
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6, 3, 3)), nn.Parameter(torch.randn(8))
        self.head, self.beside = nn.Linear(8, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.own:
            y, mean = Convolves.apply(x, self.weight, self.bias)
        else:
            y, mean = F.conv2d(x, self.weight, self.bias, padding=1), x.mean((2, 3))
        return self.head(y.relu().mean((2, 3))) + self.beside(mean)


def test_a_users_own_function_of_several_tensors_is_looked_into() -> None:
    torch.manual_seed(0)
    model, x = Convolution(True), torch.randn(2, 3, 6, 6)
    plain = Convolution(False)
    plain.load_state_dict(model.state_dict())
    graph = lower(capture(model, x))
    assert not graph.opaque
    other = lower(capture(plain, x))
    assert graph.kernels.keys() == other.kernels.keys()
    masks = {name: torch.rand(kernels.shape) < 0.2 for name, kernels in graph.kernels.items()}
    wanted, found = reach(other, masks), reach(graph, masks)
    assert all(torch.equal(found[name], wanted[name]) for name in graph.kernels)
    pruned = apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = compact(pruned.eval(), example_inputs=x)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(x), pruned(x))
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


class Own(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 6, bias=False), nn.Linear(6, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function.apply(self.a(x), 2.0))


def test_a_users_own_function_is_looked_into_where_it_is_not_elementwise() -> None:
    example = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for function in (Shares, RootOfMean, Kept):
        assert not lower(capture(Own(function), example)).opaque
    (op,) = lower(capture(Own(InPlace), example)).opaque
    assert op.reason == "InPlace.apply is not elementwise"


def test_a_users_own_function_is_elementwise_if_it_computes_so() -> None:
    torch.manual_seed(0)
    model, example = Own(Halve), torch.randn(2, 4)
    graph = lowered(model, example)
    plain = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2))
    masks = random_masks(plain, 0.4, 0)
    named = {{"0.weight": "a.weight", "1.weight": "b.weight"}[name]: mask for name, mask in masks.items()}
    wanted = effective_parameters(plain, example, masks)
    found = reach(graph, named)
    assert torch.equal(found["a.weight"], wanted["0.weight"])
    assert torch.equal(found["b.weight"], wanted["1.weight"])
    assert not lower(capture(Own(Root), example)).opaque
