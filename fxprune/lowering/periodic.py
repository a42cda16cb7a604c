"""Fold an axis onto a periodic one: what lies beyond an end is added at the other."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fold_periodically"]


def fold_periodically(x: Tensor, dim: int, before: int, size: int) -> Tensor:
    """Add up ``x`` along ``dim`` into ``size`` entries, of which the first is ``before`` periodically."""
    index = (torch.arange(x.shape[dim], device=x.device) - before) % size
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_add(dim, index, x)
