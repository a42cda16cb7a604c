"""A user's own autograd functions."""

from __future__ import annotations

from typing import Any

import torch
from oracle import effective_parameters, random_masks
from torch import Tensor, nn

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
        return torch.sqrt(x) * x.mean(-1, keepdim=True)


def test_a_users_own_function_is_elementwise_if_it_computes_so() -> None:
    class Own(nn.Module):
        def __init__(self, function: type[torch.autograd.Function]) -> None:
            super().__init__()
            self.a, self.b, self.function = nn.Linear(4, 6, bias=False), nn.Linear(6, 2), function

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.function.apply(self.a(x), 2.0))

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
    (op,) = lower(capture(Own(Shares), example)).opaque
    assert op.reason == "Shares.apply is not elementwise"
    assert not lower(capture(Own(Root), example)).opaque
    (op,) = lower(capture(Own(RootOfMean), example)).opaque
    assert op.reason == "RootOfMean.apply is not elementwise"
