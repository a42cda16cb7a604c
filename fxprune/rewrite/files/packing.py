"""Bits in bytes: a bool tensor comes in, an eighth of a byte per entry goes out; and back again."""

from __future__ import annotations

import torch

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bytes: entry i, in row-major order, is bit i % 8 of byte i // 8.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded * torch.tensor(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of :func:`pack`.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), torch.Size([3]))
    tensor([ True, False,  True])
    """
    size = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
        raise ValueError(f"{tuple(packed.shape)} bytes for a mask of shape {tuple(shape)}")
    bits = packed.unsqueeze(1).bitwise_and(torch.tensor(_BITS, dtype=torch.uint8)) != 0
    if bits.flatten()[size:].any():
        raise ValueError("bits are set beyond the end of a mask")
    return bits.flatten()[:size].reshape(shape).clone()
