"""What a linear map does, found by asking it: a function of flat tensors comes in, its entries go out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.paths.circuit.parts import Entries, Function

__all__ = ["matrices", "picked"]

PROBED = 256
"""Entries up to which a map is read off its values one by one."""


def matrices(
    sizes: Sequence[int], function: Function, dtype: torch.dtype
) -> tuple[tuple[Entries, ...], int] | None:
    """The matrices of a linear function, if one side of each is small enough to be probed; their height."""
    zeros = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    height = function(zeros).numel()
    if any(min(size, height) > PROBED for size in sizes):
        return None
    found: list[Entries] = []
    for place, size in enumerate(sizes):
        if size <= height:
            units = torch.eye(size, dtype=torch.float64)
            columns = [function([*zeros[:place], unit, *zeros[place + 1 :]]) for unit in units]
            matrix = torch.stack(columns, 1)
        else:
            with torch.enable_grad():
                x = zeros[place].clone().requires_grad_()
                entries = function([*zeros[:place], x, *zeros[place + 1 :]]).unbind()
                matrix = torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0] for y in entries])
        out, into = matrix.nonzero(as_tuple=True)
        found.append(Entries(out, into, matrix[out, into].to(dtype)))
    return tuple(found), height


def picked(probe: Tensor, result: Tensor) -> tuple[Tensor | None, float] | None:
    """``(index, c)`` with ``result = c * probe[index]`` (index None: the identity), if there are such."""
    if result.numel() == probe.numel() and result.numel():
        ratio = result / probe
        coefficient = float(ratio[0])
        if coefficient > 0 and bool((ratio - coefficient).abs().max() <= 1e-12 * coefficient):
            return None, float(f"{coefficient:.12g}")
    ordered, order = probe.sort()
    place = torch.searchsorted(ordered, result.contiguous()).clamp(max=probe.numel() - 1)
    if probe.numel() and torch.equal(ordered[place], result):
        return order[place], 1.0
    return None
