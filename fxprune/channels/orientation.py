"""Read the weight of a transposed convolution with its output channels first."""

from __future__ import annotations

import torch

__all__ = ["swap_orientation"]


def swap_orientation(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Swap ``(in, out / groups, *taps)`` and ``(out, in / groups, *taps)``; a second swap is the way back.

    >>> swap_orientation(torch.tensor([[1, 2, 3], [4, 5, 6]]), groups=1)
    tensor([[1, 4],
            [2, 5],
            [3, 6]])
    """
    apart = x.reshape(groups, -1, *x.shape[1:])
    return apart.transpose(1, 2).flatten(0, 1)
