"""Layer norms over fewer channels that give what they gave over all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NarrowedLayerNorm", "NarrowedRMSNorm"]


class NarrowedLayerNorm(nn.Module):
    """A layer norm over ``width`` channels of which some are gone: their sums are constants.

    ``total``, ``squares``: the sum of the removed entries and of their squares, one for all positions or one
    for each.
    """

    total: Tensor
    squares: Tensor

    def __init__(self, width: int, eps: float, total: Tensor, squares: Tensor) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_buffer("total", total)
        self.register_buffer("squares", squares)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Normalise the last axis."""
        mean = (x.sum(-1, keepdim=True) + self.total) / self.width
        centred = x - mean
        # The removed entries' squared distances from the mean: sum (c - m)^2.
        removed = self.width - x.shape[-1]
        rest = self.squares - 2 * mean * self.total + removed * mean * mean
        variance = ((centred * centred).sum(-1, keepdim=True) + rest) / self.width
        result = centred * torch.rsqrt(variance + self.eps)
        if weight is not None:
            result = result * weight
        return result if bias is None else result + bias


class NarrowedRMSNorm(nn.Module):
    """A root-mean-square norm over ``width`` channels of which some are gone."""

    squares: Tensor

    def __init__(self, width: int, eps: float | None, squares: Tensor) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_buffer("squares", squares)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Normalise the last axis."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        mean = ((x * x).sum(-1, keepdim=True) + self.squares) / self.width
        result = x * torch.rsqrt(mean + eps)
        return result if weight is None else result * weight
