"""Read batches from the data that the caller has, check them, and cut them into parts.

A pair ``(x, y)``, a mapping or a tensor of inputs without labels is one batch; anything else is an iterable
of batches (a ``DataLoader``, a list). In a pair x may be a tensor, a tuple (several inputs) or a mapping
(keyword inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.scoring.contract import Problem
from fxprune.scoring.forms import check_batch, inputs_and_labels, is_batch, iterate, tensors_in


@dataclass(frozen=True)
class Batch:
    """Hold one batch on the problem's device: ``inputs`` and ``target``, or a mapping of the caller's.

    ``target`` is None in a mapping, and where inputs came without labels.
    """

    inputs: Any
    target: Any = None
    mapping: bool = False


@contextmanager
def seeded(problem: Problem) -> Iterator[None]:
    """Seed random numbers from the problem's generator; put the random state back afterwards."""
    kind = problem.device.type
    index = problem.device.index
    devices = (
        [] if kind == "cpu" else [torch.get_device_module(kind).current_device() if index is None else index]
    )
    seed = int(torch.randint(2**62, (), generator=problem.generator))
    with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
        torch.manual_seed(seed)
        yield


def batches(problem: Problem, number: int | None, method: str) -> list[Batch]:
    """Read the first ``number`` batches of ``problem.data`` (``None``: all) under the problem's seed.

    Raises ``ValueError`` for missing data, a batch that is empty, not finite or in no known form,
    and for data that runs dry; ``TypeError`` for data that is no batch and cannot be iterated.
    """
    data = problem.data
    found: list[Batch] = []
    with seeded(problem):
        for batch in stream(data, problem.device, method):
            found.append(batch)
            if len(found) == number:
                return found
    if found and number is None:
        return found
    if not found:
        used_up = " any more; an iterator can be read only once" if isinstance(data, Iterator) else ""
        raise ValueError(f"method {method!r}: data yields no batch{used_up}")
    raise ValueError(
        f"method {method!r}: data ran dry after {len(found)} of {number} batches; give more, "
        f"or ask for batches={len(found)}"
    )


def stream(data: Any, device: torch.device, method: str) -> Iterator[Batch]:
    """Yield the batches of ``data`` one by one, checked and on ``device``; raises what `batches` does."""
    if data is None:
        raise ValueError(f"method {method!r} needs data=..., a pair (x, y) or an iterable of batches")
    for index, batch in enumerate([data] if is_batch(data) else iterate(data, f"method {method!r}: ")):
        yield _check(batch, index, device, method)


def pieces(problem: Problem, batch: Batch) -> Iterator[tuple[Batch, float]]:
    """Cut ``batch`` into pieces of ``problem.micro_batch`` samples; yield each with its share in the mean.

    The shares add up to one. The mean loss of the batch is the sum of the pieces' losses times their shares,
    for any loss that is a mean over samples. Every tensor with as many rows as there are samples is cut.
    Labels of -100, which cross entropy leaves out of its mean, do not count in the shares.
    """
    size = _samples(batch)
    if problem.micro_batch is None or size <= problem.micro_batch:
        yield batch, 1.0
        return
    counted = _counted_labels(problem, batch)
    for start in range(0, size, problem.micro_batch):
        rows = slice(start, start + problem.micro_batch)
        part = _cut(batch, rows, size)
        if counted is None:
            yield part, (min(rows.stop, size) - start) / size
        elif bool(counted[rows].any()):
            yield part, int(counted[rows].sum()) / int(counted.sum())


def _counted_labels(problem: Problem, batch: Batch) -> torch.Tensor | None:
    """Mark the labels that cross entropy counts in its mean; ``None`` for other losses and targets."""
    labels = batch.target
    if problem.loss_fn is not None or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    return labels != -100


def _cut(batch: Batch, rows: slice, size: int) -> Batch:
    """Take some samples of a batch of ``size``."""
    return Batch(_rows(batch.inputs, rows, size), _rows(batch.target, rows, size), batch.mapping)


def samples_of(batch: Batch) -> list[Batch]:
    """Cut ``batch`` into its single samples, batches of size one."""
    size = _samples(batch)
    return [_cut(batch, slice(start, start + 1), size) for start in range(size)]


def _samples(batch: Batch) -> int:
    """Count the samples: the rows of the first input that has any."""
    return next((tensor.shape[0] for tensor in tensors_in(batch.inputs) if tensor.dim()), 1)


def _rows(value: Any, rows: slice, size: int) -> Any:
    """Take ``rows`` of every tensor with ``size`` of them, in nested containers; keep everything else."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.dim() and value.shape[0] == size else value
    if isinstance(value, dict):
        return {key: _rows(part, rows, size) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_rows(part, rows, size) for part in value)
    return value


def _check(batch: Any, index: int, device: torch.device, method: str) -> Batch:
    where = f"method {method!r}: batch {index} of data"
    check_batch(batch, where)
    inputs, target = inputs_and_labels(batch)
    for tensor in tensors_in(inputs):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = tensor.aminmax()  # one pass, and NaN comes through
        if not math.isfinite(float(high) - float(low)):
            raise ValueError(f"{where} holds NaN or infinite inputs")
    return Batch(_move(inputs, device), _move(target, device), isinstance(batch, Mapping))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_move(part, device) for part in value)
    return value
