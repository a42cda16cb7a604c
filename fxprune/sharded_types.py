"""Recognise the types of sharded models without importing them.

``torch.distributed.tensor`` and ``torch.distributed.fsdp`` take as long to import as the rest of PyTorch. A
tensor or a module can only be of their types once somebody has imported them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["is_dtensor", "is_fsdp_class", "is_fsdp_module"]


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Return whether ``value`` is a ``DTensor``.

    >>> import torch
    >>> is_dtensor(torch.ones(1))
    False
    """
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(value, library.DTensor)


def is_fsdp_module(value: object) -> TypeIs[FSDPModule]:
    """Return whether ``value`` is a module that ``fully_shard`` has split.

    >>> import torch
    >>> is_fsdp_module(torch.nn.Linear(1, 1))
    False
    """
    library = sys.modules.get("torch.distributed.fsdp")
    return library is not None and isinstance(value, library.FSDPModule)


def is_fsdp_class(cls: type[object]) -> bool:
    """Return whether ``fully_shard`` made the class ``cls``, on top of a module's own.

    >>> import torch
    >>> is_fsdp_class(torch.nn.Linear)
    False
    """
    library = sys.modules.get("torch.distributed.fsdp")
    return library is not None and library.FSDPModule in cls.__bases__
