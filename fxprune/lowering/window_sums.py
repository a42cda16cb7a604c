"""Sums over the windows of a pool: what the counting of paths needs beside the network's own operation.

All of them work on the last axes of a tensor of any rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.lowering.periodic import fold_periodically

__all__ = ["Geometry", "adaptive_sum", "fold_on_torus", "resample", "running_sum", "window_sum"]


@dataclass(frozen=True)
class Geometry:
    """A pooling window over the last axes of an image of ``size``; ``out`` is the output's size.

    The last windows may hang over the end.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]
    out: tuple[int, ...]


def window_sum(x: Tensor, geometry: Geometry, *, periodic: bool = False) -> Tensor:
    """Sum over every window; beyond the image there are zeros, or the image again."""
    rank = len(geometry.kernel)
    flat = x.reshape(-1, 1, *x.shape[-rank:])
    # A part of the image may have been cut out, by whole strides.
    out = [
        m - (n - x.shape[d - rank]) // geometry.stride[d]
        for d, (n, m) in enumerate(zip(geometry.size, geometry.out, strict=True))
    ]
    for d in range(rank):
        size, before = x.shape[d - rank], geometry.padding[d]
        span = (out[d] - 1) * geometry.stride[d] + geometry.dilation[d] * (geometry.kernel[d] - 1) + 1
        index = torch.arange(-before, span - before, device=x.device)
        if periodic:
            flat = flat.index_select(2 + d, index % size)
        else:
            amounts = [0, 0] * (rank - 1 - d) + [before, max(0, span - before - size)]
            flat = F.pad(flat, amounts)
    ones = torch.ones((1, 1, *geometry.kernel), dtype=x.dtype, device=x.device)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    total = conv(flat, ones, stride=geometry.stride, dilation=geometry.dilation)
    for d, n in enumerate(out):
        total = total.narrow(2 + d, 0, n)
    return total.reshape(*x.shape[:-rank], *out)


def adaptive_sum(x: Tensor, out: Sequence[int]) -> Tensor:
    """Sum over the windows of an adaptive pool with outputs of size ``out``."""
    rank = len(out)
    average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
    counts = torch.ones(())
    for n, m in zip(x.shape[-rank:], out, strict=True):
        width = torch.tensor([math.ceil((i + 1) * n / m) - i * n // m for i in range(m)], dtype=torch.float32)
        counts = counts[..., None] * width
    pooled: Tensor = average(x, tuple(out))  # type: ignore[arg-type]
    return pooled * counts.to(pooled)


def running_sum(x: Tensor, dim: int, *, backwards: bool = False) -> Tensor:
    """Add to every entry those before it on the axis (``backwards``: after it)."""
    return x.flip(dim).cumsum(dim).flip(dim) if backwards else x.cumsum(dim)


def resample(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each of the last axes with a matrix, ``(in, out)``."""
    rank = len(matrices)
    for axis, matrix in enumerate(matrices):
        x = (x.movedim(axis - rank, -1) @ matrix.to(x)).movedim(-1, axis - rank)
    return x


def fold_on_torus(
    x: Tensor, output_size: Sequence[int], kernel_size: object, dilation: object, padding: Sequence[int],
    stride: object,
) -> Tensor:  # fmt: skip
    """Put patches back in place on a periodic image, overlaps added."""
    wide = [size + 2 * pad for size, pad in zip(output_size, padding, strict=True)]
    x = F.fold(x, wide, kernel_size, dilation, 0, stride)  # type: ignore[arg-type]
    for dim, pad, size in zip((-2, -1), padding, output_size, strict=True):
        x = fold_periodically(x, dim, pad, size)
    return x
