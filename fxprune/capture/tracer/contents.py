"""Ask what is in a value: tensors, numbers, or an object that holds such."""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["ATOMS", "LITERALS", "has_content", "has_tensor", "is_record", "length"]

LITERALS = (type(None), bool, int, float, str, torch.dtype)
ATOMS = (
    *LITERALS, complex, bytes, torch.memory_format, torch.layout, torch.device, type(...), enum.Enum, fx.Node
)  # fmt: skip


def is_record(value: Any) -> bool:
    """Whether a value is an object that merely holds others, as an image list does."""
    reduces: Any = type(value).__reduce_ex__
    plain_object = reduces is object.__reduce_ex__ and hasattr(value, "__dict__")
    return plain_object and not callable(value) and not isinstance(value, ModuleType)


def has_content(value: Any) -> bool:
    """Whether there is a tensor or a number in a result."""
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    if isinstance(value, tuple | list):
        return any(has_content(item) for item in value)
    if isinstance(value, dict):
        return any(has_content(item) for item in value.values())
    return isinstance(value, Tensor) or is_record(value)


def has_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(has_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(has_tensor(item) for item in value.values())
    return isinstance(value, Tensor)


def length(value: Any) -> int | None:
    """Size of the first axis of a tensor; None for anything else."""
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else None
