"""Work out the shapes of packed sequences, as if all of them were as long as the longest one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["is_packed", "packed_results", "packed_shapes", "padded_shapes"]


def packed_shapes(padded: Tensor, longest: int, *, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The data and the batch sizes of sequences of up to ``longest`` steps.

    Example:
        >>> data, sizes = packed_shapes(torch.ones(2, 5, 3), 4, batch_first=True)
        >>> data.shape, sizes.shape
        (torch.Size([8, 3]), torch.Size([4]))
    """
    batch = padded.shape[0 if batch_first else 1]
    data = torch.empty(longest * batch, *padded.shape[2:], dtype=padded.dtype, device="meta")
    return data, torch.empty(longest, dtype=torch.int64, device="meta")


def padded_shapes(data: Tensor, sizes: Tensor, total: int, *, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The padded sequences, of ``total`` steps, and their lengths.

    Example:
        >>> padded, lengths = padded_shapes(torch.ones(8, 3), torch.ones(4), 5, batch_first=True)
        >>> padded.shape, lengths.shape
        (torch.Size([2, 5, 3]), torch.Size([2]))
    """
    batch = data.shape[0] // sizes.shape[0]
    axes = (batch, total) if batch_first else (total, batch)
    padded = torch.empty(*axes, *data.shape[1:], dtype=data.dtype, device="meta")
    return padded, torch.empty(batch, dtype=torch.int64, device="meta")


def is_packed(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer is called on a packed sequence."""
    return isinstance(module, nn.RNNBase) and bool(args) and isinstance(args[0], PackedSequence)


def packed_results(module: Any, packed: PackedSequence) -> tuple[Any, Any]:
    """The packed results of a recurrent layer, and its last states."""
    data, sizes = packed.data, packed.batch_sizes
    ways, size = 2 if module.bidirectional else 1, module.proj_size or module.hidden_size
    batch = data.shape[0] // sizes.shape[0]

    def states(width: int) -> Tensor:
        return data.new_empty(module.num_layers * ways, batch, width)

    out = type(packed)._make((data.new_empty(data.shape[0], ways * size), *packed[1:]))
    return out, (states(size), states(module.hidden_size)) if isinstance(module, nn.LSTM) else states(size)
