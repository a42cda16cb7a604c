"""Two networks around one operation, so that every entry and every channel that it reads can be dead."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from oracle import prunable
from torch import Tensor, nn

from lowering.agreement import assert_flow, assert_reach, lowered

__all__ = ["Entries", "Natural", "check", "check_against"]


def _module(function: Any) -> Any:
    """A fresh module where ``function`` makes one (it takes no argument); a function stays what it is."""
    return function if inspect.signature(function).parameters else function()


class Entries(nn.Module):
    """linear - operation - linear on flattened tensors: each entry is a channel of its own."""

    def __init__(self, function: Callable[..., Any], shape: Sequence[int]) -> None:
        super().__init__()
        self.op, self.shape = _module(function), tuple(shape)
        self.before = nn.Linear(4, math.prod(shape), bias=False)
        self.after = nn.Linear(_run(self.op, shape)[0].numel(), 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(self.before(x).reshape(-1, *self.shape))
        return self.after(y.reshape(x.shape[0], -1))

    def example(self) -> Tensor:
        return torch.randn(2, 4)


class Natural(nn.Module):
    """A layer on the channels, the operation, a layer on the channels: positions are all alike."""

    def __init__(self, function: Callable[..., Any], shape: Sequence[int]) -> None:
        super().__init__()
        self.op, self.shape = _module(function), tuple(shape)
        self.before = self._layer(shape, shape[0] if len(shape) == 3 else shape[-1])
        result = _run(self.op, shape).shape[1:]
        self.after = self._layer(result, 3) if result else nn.Identity()

    @staticmethod
    def _layer(shape: Sequence[int], out: int) -> nn.Module:
        if len(shape) == 3:
            return nn.Conv2d(shape[0], out, 1, bias=False)
        return nn.Linear(shape[-1], out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(self.before(x)))

    def example(self) -> Tensor:
        return torch.randn(2, *self.shape)


def _run(op: Callable[..., Any], shape: Sequence[int]) -> Tensor:
    with torch.no_grad():
        result = op.eval()(torch.ones(2, *shape)) if isinstance(op, nn.Module) else op(torch.ones(2, *shape))
    assert isinstance(result, Tensor)
    return result


def masks_for(model: nn.Module, seed: int, density: float, named: Iterable[str] = ()) -> dict[str, Tensor]:
    """The layer before the operation has rows that are dead, the others are thinned out evenly."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in prunable(model, named).items():
        mask = torch.rand(weight.shape, generator=generator) < max(density, 0.5)
        if name == "before.weight":
            rows = torch.rand(weight.shape[0], generator=generator) < density
            mask = mask & rows.reshape(-1, *[1] * (weight.dim() - 1))
        masks[name] = mask
    return masks


def check(
    function: Callable[..., Any],
    shape: Sequence[int],
    *,
    kinds: Sequence[type[Entries | Natural]] = (Entries, Natural),
    counts: bool = True,
    derivatives: bool = True,
    periodic: bool = True,
) -> None:
    """The operation between dead and live channels, and between dead and live entries, as the oracle says."""
    for kind in kinds:
        torch.manual_seed(0)
        model: Any = kind(function, shape).eval()
        example = model.example()
        graph = lowered(model, example)
        assert set(graph.kernels) >= set(prunable(model))
        masks = masks_for(model, 0, 0.5, graph.kernels)
        assert_reach(graph, model, example, masks, periodic=periodic)
        if counts:
            assert_flow(graph, model, example, masks, derivatives=derivatives and kind is Natural)


def check_against(
    function: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], shape: Sequence[int]
) -> None:
    """Compare the paths of an operation with those that the oracle finds in plain operations."""
    torch.manual_seed(0)
    model, stated = Entries(function, shape).eval(), Entries(plain, shape).eval()
    example = model.example()
    graph = lowered(model, example)
    for seed, density in enumerate((0.5, 0.2)):
        assert_reach(graph, stated, example, masks_for(model, seed, density), periodic=False)
