"""Find the taps of a convolution that see anything but padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.graph import ir

__all__ = ["live_taps"]


def live_taps(
    window: ir.Window, size: Sequence[int], out: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> Tensor:
    """Taps that meet at least one entry that is not padding: bool, of the taps' shape.

    Along each axis tap ``t`` of output ``p`` reads input ``p * stride - before + t * dilation`` (for a
    transposed convolution input ``p`` writes to output ``p * stride - before + t * dilation``).
    """
    grid = torch.ones(window.kernel, dtype=torch.bool)
    if window.mode != "zeros":
        return grid
    for axis, kernel in enumerate(window.kernel):
        before = window.padding[axis][0]
        places = torch.arange(size[axis] if window.transposed else out[axis])
        taps = torch.arange(kernel)
        seen = places[:, None] * window.stride[axis] - before + taps * window.dilation[axis]
        low, high = (0, out[axis]) if window.transposed else ranges[axis]
        live = ((seen >= low) & (seen < high)).any(0)
        view = [1] * len(window.kernel)
        view[axis] = kernel
        grid = grid & live.reshape(view)
    return grid
