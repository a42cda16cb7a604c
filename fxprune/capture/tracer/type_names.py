"""``Tensor.type``: names of types that were read off a tensor, and those that code spells out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.torch_private import DisableTorchFunction

__all__ = ["NUMBER_TYPES", "TypeName", "dtype_of"]

NUMBER_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
"""What PyTorch takes Python's types for, where a type of numbers is asked for."""


class TypeName(str):
    """The name of the type of ``tensor``, as ``tensor.type()`` gives it."""

    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor, device: torch.device) -> TypeName:
        """Name the type that ``tensor``, which has a shape only, has on ``device``.

        >>> TypeName.of(torch.empty(2, device="meta"), torch.device("cpu"))
        'torch.FloatTensor'
        """
        with DisableTorchFunction():
            plain = torch.empty(0, dtype=tensor.dtype, device="cpu").type()
        place = "" if device.type == "cpu" else f"{device.type}."
        name = cls(f"torch.{place}{str(plain).rpartition('.')[2]}")
        name.tensor = tensor
        return name


def dtype_of(kind: Any) -> torch.dtype:
    """Return the type of numbers that the name or the class of a type of tensors stands for.

    >>> dtype_of("torch.cuda.HalfTensor"), dtype_of(torch.LongTensor)
    (torch.float16, torch.int64)
    """
    kind = getattr(torch, kind.rpartition(".")[2]) if isinstance(kind, str) else kind
    found: torch.dtype = kind.dtype
    return found
