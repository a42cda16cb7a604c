"""Weights on the host, the model on another device: one that is made of host memory, but keeps apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from methods.problems import problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune import methods
from fxprune.methods import Problem
from fxprune.scoring import data, gradients

DEVICE = torch.device("meta")
"""What the device calls itself: the one that autograd knows beside the host without any hardware."""


class Away(torch.Tensor):
    """A tensor on the device."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Away:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, device=DEVICE
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})


def on_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation whose tensors are all on the device, scalars aside; or a move from or to it."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    moves = func is torch.ops.aten._to_copy.default
    if not moves and any(isinstance(x, Away) for x in given):
        strangers = [x for x in given if not isinstance(x, Away) and x.dim()]
        assert not strangers, f"{func} mixes devices"
    away = target == DEVICE if target is not None else any(isinstance(x, Away) for x in given)
    args, kwargs = tree_map_only(Away, lambda x: x.inside, (args, kwargs))
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    found = func(*args, **kwargs)
    return tree_map_only(torch.Tensor, Away, found) if away else found


class Device(TorchDispatchMode):
    """Moves tensors to the device, and counts gradients that are there when one leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[torch.Tensor] = []
        self.crowd: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], Away):
            self.crowd.append(sum(leaf.grad is not None for leaf in self.leaves))
        return on_device(func, args, kwargs)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6, bias=False), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 3, bias=False))


BATCHES = [
    (torch.randn(5, 6, generator=torch.Generator().manual_seed(i)), torch.arange(5) % 3) for i in (0, 1)
]


@contextmanager
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The device, which has no random numbers of its own."""
    made = Device()
    masked = gradients.masked

    def watched(*args: Any) -> dict[str, torch.Tensor]:
        weights = masked(*args)
        made.leaves = list(weights.values())
        return weights

    monkeypatch.setattr(gradients, "masked", watched)
    for module in (gradients, data):
        monkeypatch.setattr(module, "seeded", lambda _: nullcontext())
    with made:
        yield made


def offloaded(asked: Problem) -> Problem:
    return replace(asked, device=DEVICE)


def test_gradients_come_home_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(net(), 0.6, data=BATCHES)
    expected = gradients.gradients_of(asked, asked.masks, batches=2, mode="train", method="snip")
    with device(monkeypatch) as there:
        found = gradients.gradients_of(offloaded(asked), asked.masks, batches=2, mode="train", method="snip")
    assert all(type(gradient) is torch.Tensor for gradient in found.values())
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
    moves = [number for number in there.crowd if number]
    assert moves == [1] * len(expected) * len(BATCHES), "one layer's gradient at a time"


@pytest.mark.parametrize("name", ["snip", "force", "grasp"])
def test_masks_are_those_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(net(), 0.6, data=BATCHES)
    options = {"rounds": 3} if name == "force" else {}
    expected = methods.get(name, **options).find(asked)
    with device(monkeypatch):
        found = methods.get(name, **options).find(offloaded(asked))
    assert all(type(mask) is torch.Tensor for mask in found.values())
    assert all(torch.equal(found[label], mask) for label, mask in expected.items())
