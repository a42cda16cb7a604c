"""Copies of models that ``copy.deepcopy`` alone refuses: a module comes in, a copy goes out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def duplicate(model: Model, shared: Iterable[torch.Tensor] = ()) -> Model:
    """A deep copy that shares the tensors in ``shared`` with the original.

    Results that modules keep as plain attributes (position biases gathered once for evaluation) are copied as
    values: ``deepcopy`` refuses tensors that have a gradient function.

    >>> layer = nn.Linear(2, 1)
    >>> duplicate(layer, [layer.weight]).weight is layer.weight
    True
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
