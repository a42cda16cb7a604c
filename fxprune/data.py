"""Samples for scoring: a data set comes in, a loader over equally many samples of every class goes out.

Some methods (GraSP, PX) ask for such data; what this makes can be passed as ``data=`` to any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset


def balanced(
    dataset: Dataset[Any] | tuple[torch.Tensor, torch.Tensor],
    per_class: int = 10,
    *,
    batch_size: int | None = None,
    labels: Sequence[int] | torch.Tensor | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """A loader over ``per_class`` random samples of every class, the same in the same order each time.

    Args:
        dataset: a data set of pairs (x, label) with a length, or a pair of tensors.
        per_class: number of samples of each class that occurs.
        batch_size: samples per batch; ``None`` puts all in one. Classes take turns, so that every batch of a
            multiple of their number is balanced too.
        labels: the labels of all samples. Where missing, ``dataset.targets`` is taken if it is there; if
            not, every sample is read once.
        seed: decides which samples and in which order.

    Raises:
        ValueError: an empty data set, a class with too few samples, labels that are not one integer per
            sample, numbers below 1.

    >>> x, y = torch.arange(6.0).view(6, 1), torch.tensor([0, 0, 1, 1, 1, 0])
    >>> [sorted(labels.tolist()) for _, labels in balanced((x, y), 2, batch_size=2)]
    [[0, 1], [0, 1]]
    """
    for argument, number in (("per_class", per_class), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{argument}={number!r}: expected an integer of at least 1")
    samples = TensorDataset(*dataset) if isinstance(dataset, tuple) else dataset
    known = _labels(samples, labels)
    generator = torch.Generator().manual_seed(seed)
    chosen = [_some_of(known, label, per_class, generator) for label in sorted(set(known.tolist()))]
    rounds = torch.stack(chosen, dim=1)
    turns = [one[torch.randperm(len(one), generator=generator)] for one in rounds]
    order = torch.cat(turns).tolist()
    return DataLoader(Subset(samples, order), batch_size=batch_size or len(order))


def _labels(dataset: Dataset[Any], labels: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    size = len(dataset)  # type: ignore[arg-type]
    given = getattr(dataset, "targets", None) if labels is None else labels
    if given is None and isinstance(dataset, TensorDataset):
        given = dataset.tensors[1]
    if given is None:
        given = [dataset[index][1] for index in range(size)]
    found = torch.as_tensor(given)
    if found.is_floating_point() or found.shape != (size,) or not size:
        raise ValueError(
            f"labels of shape {tuple(found.shape)} and type {found.dtype} for {size} samples: expected one "
            "integer each; pass labels=..."
        )
    return found


def _some_of(labels: torch.Tensor, label: int, number: int, generator: torch.Generator) -> torch.Tensor:
    members = (labels == label).nonzero().flatten().cpu()
    if len(members) < number:
        raise ValueError(f"per_class={number}: class {label} has only {len(members)} samples")
    return members[torch.randperm(len(members), generator=generator)[:number]]
