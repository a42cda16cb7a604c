"""Layer, RMS and group norms over fewer channels that give what they gave over all of them.

Compaction puts them into graphs, where they stay one node each: a norm that lost channels can lose more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NARROWED", "NarrowedGroupNorm", "NarrowedLayerNorm", "NarrowedRMSNorm"]


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


class NarrowedGroupNorm(nn.Module):
    """A group norm over ``width`` channels in each group, of which some are gone.

    ``total``, ``squares``: (groups, 1), by group the sum of the removed entries of one position, and of their
    squares.
    """

    total: Tensor
    squares: Tensor

    def __init__(self, width: int, eps: float, total: Tensor, squares: Tensor) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_buffer("total", total)
        self.register_buffer("squares", squares)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Normalise axis 1 and all after it, group by group."""
        groups = self.total.shape[0]
        entries = x.reshape(x.shape[0], groups, -1)
        positions = entries.shape[-1] // (x.shape[1] // groups)
        size = self.width * positions
        total = self.total * positions
        mean = (entries.sum(-1, keepdim=True) + total) / size
        centred = entries - mean
        # The removed entries' squared distances from the mean: sum (c - m)^2.
        rest = self.squares * positions - 2 * mean * total + (size - entries.shape[-1]) * mean * mean
        variance = ((centred * centred).sum(-1, keepdim=True) + rest) / size
        result = (centred * torch.rsqrt(variance + self.eps)).reshape(x.shape)
        shape = (-1, *[1] * (x.dim() - 2))
        if weight is not None:
            result = result * weight.view(shape)
        return result if bias is None else result + bias.view(shape)


NARROWED = (NarrowedGroupNorm, NarrowedLayerNorm, NarrowedRMSNorm)
