"""The masked network computed in the user's own model, in float64, to compare a compact one with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxprune

Cases = dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]
"""By name, a function that makes a network, and one that makes its inputs."""


def adder(cases: Cases) -> Callable[[Callable[[], Any]], Callable[[type[nn.Module]], type[nn.Module]]]:
    """Return a decorator that adds a class of networks to ``cases``, with a function that makes inputs."""

    def case(inputs: Callable[[], Any]) -> Callable[[type[nn.Module]], type[nn.Module]]:
        def add(cls: type[nn.Module]) -> type[nn.Module]:
            cases[cls.__name__] = cls, inputs
            return cls

        return add

    return case


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw parameters that leave no zeros and no equal channels, and statistics of batch norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4) if parameter.dim() > 1 else parameter.uniform_(0.2, 1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model.eval()


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a model gives in float64."""
    wide = pytree.tree_map(
        lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, inputs
    )
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            result = copy.deepcopy(model).double()(*(wide if isinstance(wide, tuple) else (wide,)))
    finally:
        torch.set_default_dtype(torch.float32)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def assert_same(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-6) -> None:
    """Compare outputs with the largest entry of each; constants that moved into biases were rounded."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * max(1e-3, float(a.abs().max()))


def assert_compacts(
    model: nn.Module, inputs: Any, share: float, method: str = "random", **options: Any
) -> fx.GraphModule:
    """Prune channels, compact, and compare: outputs are the same, and of every mask nothing is left over."""
    pruned = fxprune.apply(
        model, method, share, granularity="channel", example_inputs=inputs, progress=False, seed=1, **options
    )
    small = fxprune.compact(pruned, inputs)
    masked, masks = copy.deepcopy(model), fxprune.masks(pruned)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
    assert_same(outputs(masked, inputs), outputs(small, inputs))
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0, str(table)
    assert table.parameters[1] < table.parameters[0]
    sizes = {name: parameter.numel() for name, parameter in small.named_parameters()}
    kept = {name: int(mask.sum()) for name, mask in masks.items() if name in sizes}
    assert {name: sizes[name] for name in kept} == kept
    return small
