"""Tell the forms in which callers hand over data: a batch, an iterable of batches, or neither.

A pair ``(x, y)`` or a mapping is one batch, and so is a tensor of inputs, alone or in a list of its own, as
a ``DataLoader`` of a ``TensorDataset`` without labels has it. In a pair x may be a tensor, a tuple of several
inputs, or a mapping of keyword inputs. What is neither a batch nor iterable is refused, with the way to make
one of it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxprune.capture.errors import users_level

__all__ = [
    "check_batch",
    "check_data",
    "check_labels",
    "inputs_and_labels",
    "is_batch",
    "iterate",
    "tensors_in",
    "warn_of_two_inputs",
]

EXPECTED = "expected a pair (x, y), a mapping, or an iterable of such batches"


def is_batch(data: Any) -> bool:
    """Return whether ``data`` is one batch: a mapping, a tensor, or a pair of model inputs and a tensor.

    >>> is_batch((torch.ones(2, 3), torch.ones(2))), is_batch([(torch.ones(2, 3), torch.ones(2))])
    (True, False)
    """
    if isinstance(data, (Mapping, torch.Tensor)):
        return True
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], torch.Tensor):
        return False
    inputs = data[0]
    several = isinstance(inputs, tuple) and any(isinstance(value, torch.Tensor) for value in inputs)
    return isinstance(inputs, (torch.Tensor, Mapping)) or several


def check_data(data: Any, who: str = "") -> None:
    """Raise ``TypeError`` for what can be told to be no data without reading a batch of it.

    ``who`` is put before the message. Data sets yield samples, not batches: the message says how to wrap one.
    """
    if isinstance(data, np.ndarray):
        raise TypeError(f"{who}data is a numpy array, {EXPECTED}: (torch.from_numpy(x), torch.from_numpy(y))")
    if isinstance(data, (tuple, list)) and any(isinstance(part, np.ndarray) for part in data):
        raise TypeError(
            f"{who}data holds numpy arrays, expected tensors: (torch.from_numpy(x), torch.from_numpy(y))"
        )
    if isinstance(data, tuple) and len(data) > 2 and all(isinstance(part, torch.Tensor) for part in data):
        raise TypeError(f"{who}data is {_several(data)}")
    if hasattr(type(data), "__getitem__") and not hasattr(type(data), "__iter__"):
        raise TypeError(
            f"{who}data is a {type(data).__name__}, which yields samples, not batches; wrap it:"
            " torch.utils.data.DataLoader(data, batch_size=64)"
        )
    if isinstance(data, str) or not hasattr(type(data), "__iter__"):
        hint = "; call it, if it returns them" if inspect.isroutine(data) else ""
        raise TypeError(f"{who}data is a {type(data).__name__}, {EXPECTED}{hint}")


def warn_of_two_inputs(data: Any) -> None:
    """Warn where a list holds two tensors of one form: it is taken for a pair, and may be two batches."""
    if not isinstance(data, list) or not is_batch(data) or not isinstance(data[0], torch.Tensor):
        return
    first, second = data
    if first.dtype == second.dtype and first.dim() > 1 and first.shape[1:] == second.shape[1:]:
        warnings.warn(
            "data: a list of two tensors is taken for a pair (x, y); two batches of inputs are [[x1], [x2]]",
            stacklevel=users_level(),
        )


def check_labels(data: Any) -> None:
    """Raise ``TypeError`` for data that are inputs without labels, where a loss needs these."""
    if isinstance(data, torch.Tensor):
        raise TypeError(f"data is a Tensor, {EXPECTED}: (data, labels)")


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """Take a checked batch apart; labels are None where it has none, or is a mapping.

    >>> inputs_and_labels([torch.ones(2, 3)])
    (tensor([[1., 1., 1.],
            [1., 1., 1.]]), None)
    """
    if isinstance(batch, (Mapping, torch.Tensor)):
        return batch, None
    return batch[0], batch[1] if len(batch) == 2 else None


def iterate(data: Any, who: str) -> Iterator[Any]:
    """Begin to read batches; raises as :func:`check_data`."""
    check_data(data, who)
    iterator: Iterator[Any] = iter(data)
    return iterator


def check_batch(batch: Any, where: str) -> None:
    """Raise ``ValueError`` for a batch that is empty, or neither a pair nor a mapping; ``where`` names it."""
    if not isinstance(batch, (Mapping, torch.Tensor)):
        alone = isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], torch.Tensor)
        if isinstance(batch, (tuple, list)) and len(batch) != 2 and not alone:
            raise ValueError(f"{where} is {_several(batch)}")
        if not isinstance(batch, Sequence) or (len(batch) != 2 and not alone):
            raise ValueError(
                f"{where} is a {type(batch).__name__}, expected a pair (x, y), a mapping or inputs"
            )
    for part in batch.values() if isinstance(batch, Mapping) else inputs_and_labels(batch):
        if isinstance(part, np.ndarray):
            raise ValueError(f"{where} holds numpy arrays, expected tensors: torch.from_numpy(x)")
    for tensor in tensors_in(batch):
        if tensor.is_meta:
            raise ValueError(f"{where} stands on the meta device, where tensors have no numbers")
        if not tensor.numel():
            raise ValueError(f"{where} is empty: it has a tensor of shape {tuple(tensor.shape)}")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _several(parts: Sequence[Any]) -> str:
    return (
        f"a {type(parts).__name__} of {len(parts)}, expected a pair (x, y) or a mapping; several inputs of a"
        " model go into a tuple of their own: ((x1, x2), y)"
    )
