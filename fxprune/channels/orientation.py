"""Read the weight of a transposed convolution with its output channels first."""

from __future__ import annotations

import torch

from fxprune.graph import KernelSet

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


def output_first(tensor: torch.Tensor, kernels: KernelSet | None) -> torch.Tensor:
    """Turn a tensor of a parameter's shape to (out, in / groups, *taps), and back again; most are so already.

    ``kernels``: those of the parameter, ``None`` where none are known.
    """
    if kernels is None or not kernels.transposed:
        return tensor
    return swap_orientation(tensor, kernels.groups)
