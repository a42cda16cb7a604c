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
        places = size[axis] if window.transposed else out[axis]
        low, high = (0, out[axis]) if window.transposed else ranges[axis]
        for tap in range(kernel):
            read = tap * window.dilation[axis] - window.padding[axis][0]  # at the first place
            first = max(0, -((read - low) // window.stride[axis]))  # the first place that reads no padding
            if first >= places or read + first * window.stride[axis] >= high:
                grid.select(axis, tap).fill_(False)
    return grid
