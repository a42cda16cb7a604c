"""Pack bool tensors into bytes, eight entries in each, and unpack them."""

from __future__ import annotations

import numpy as np
import torch


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor into bytes: entry i, in row-major order, is bit i % 8 of byte i // 8.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [5]
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo :func:`pack`; ``ValueError`` where the bytes are not those of a mask of ``shape``.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), torch.Size([3]))
    tensor([ True, False,  True])
    """
    size = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
        raise ValueError(f"{tuple(packed.shape)} bytes for a mask of shape {tuple(shape)}")
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little")).bool()
    if bits[size:].any():
        raise ValueError("bits are set beyond the end of a mask")
    return bits[:size].reshape(shape).clone()
