"""Copy models that ``copy.deepcopy`` alone refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

__all__ = ["cast_numbers", "duplicate"]

Model = TypeVar("Model", bound=nn.Module)


def duplicate(
    model: Model, shared: Iterable[torch.Tensor] = (), instead: Mapping[int, torch.Tensor] | None = None
) -> Model:
    """Copy a model, sharing the tensors in ``shared`` with the original.

    ``instead``: by the id of a tensor of the original, what the copy has in its place.

    Results that modules keep as plain attributes (position biases gathered once for evaluation) are copied as
    values: ``deepcopy`` refuses tensors that have a gradient function.

    >>> layer = nn.Linear(2, 1)
    >>> duplicate(layer, [layer.weight]).weight is layer.weight
    True
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
    memo |= instead or {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def cast_numbers(model: Model, dtype: torch.dtype) -> Model:
    """Bring the real numbers of a model to ``dtype``, and complex ones to its complex type, in place.

    ``Module.to`` with a real type makes complex numbers real, and ``Module.double`` leaves them as they are.

    >>> layer = nn.Linear(2, 1, dtype=torch.complex64)
    >>> cast_numbers(layer, torch.float64).weight.dtype
    torch.complex128
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model
