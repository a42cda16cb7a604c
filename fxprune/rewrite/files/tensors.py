"""Code the tensors of a network for a file, dense or as bits and the values that are not zero; and decode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.rewrite.files.packing import pack, unpack

__all__ = ["BITS", "decode_tensors", "encode_tensors"]

BITS = "//bits/"
"""Opens the name of a tensor of bits, one for each entry; no parameter is called so."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode_tensors(
    values: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, sparse: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file and, by name, how each is coded.

    Args:
        values: what to store; masked ones are zero where their mask is.
        masks: by name, the masks (bool); each is stored as bits.
        sparse: store masked values as those that are kept, and others so where that is smaller.
    """
    tensors: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}
    for name, value in values.items():
        entry: dict[str, Any] = {"shape": list(value.shape)}
        value = value.detach().cpu().contiguous()
        bits = masks[name].cpu() if name in masks else None
        if bits is not None:
            entry["mask"] = True
        elif sparse and value.is_floating_point():
            # The bits of the numbers, so that -0.0 comes back as it was.
            nonzero = value.reshape(-1).view(_INTEGERS[value.element_size()]).view(value.shape) != 0
            size = value.element_size() * value.numel()
            bits = nonzero if int(nonzero.sum()) * value.element_size() + value.numel() // 8 < size else None
        if bits is not None:
            tensors[BITS + name] = pack(bits)
        if bits is not None and sparse:
            entry["sparse"] = True
            value = value[bits]
        tensors[name] = value.clone()  # two names of one storage are two tensors in a file
        layout[name] = entry
    return tensors, layout


def decode_tensors(
    tensors: Mapping[str, Tensor], layout: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return values and masks of a file; ``ValueError`` or ``KeyError`` where it contradicts itself."""
    values: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, entry in layout.items():
        shape, stored = torch.Size(entry["shape"]), tensors[name]
        bits = None
        if entry.get("mask") or entry.get("sparse"):
            bits = unpack(tensors[BITS + name], shape)
        if entry.get("mask"):
            assert bits is not None
            masks[name] = bits
        if entry.get("sparse"):
            assert bits is not None
            if stored.shape != (int(bits.sum()),):
                raise ValueError(f"{name}: {tuple(stored.shape)} values for {int(bits.sum())} bits")
            whole = torch.zeros(shape, dtype=stored.dtype)
            whole[bits] = stored
            stored = whole
        if stored.shape != shape:
            raise ValueError(f"{name}: of shape {tuple(stored.shape)}, not {tuple(shape)}")
        values[name] = stored
    return values, masks
