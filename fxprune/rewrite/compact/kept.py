"""Say which entries stay of a tensor that gets smaller: indices by axis, or places one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kept", "Slices", "flat_places"]


@dataclass(frozen=True, eq=False)
class Kept:
    """The entries that stay of a tensor of ``shape``.

    ``axes``: by axis the indices that stay (int64, rising), ``None`` for all. ``flat``: where they are no
    product of indices, the flat places in the new shape instead.

    >>> Kept((2, 3), (None, torch.tensor([0, 2]))).take(torch.arange(6).view(2, 3)).tolist()
    [[0, 2], [3, 5]]
    """

    shape: tuple[int, ...]
    axes: tuple[Tensor | None, ...] = ()
    flat: Tensor | None = None

    @staticmethod
    def by_marks(marks: Sequence[Tensor]) -> Kept:
        """Return what the ``marks`` (bool) of every axis leave."""
        shape = tuple(len(mark) for mark in marks)
        return Kept(shape, tuple(None if bool(mark.all()) else mark.nonzero().flatten() for mark in marks))

    @property
    def new_shape(self) -> tuple[int, ...]:
        """The shape of what stays."""
        if self.flat is not None:
            return tuple(self.flat.shape)
        return tuple(
            size if index is None else len(index) for size, index in zip(self.shape, self.axes, strict=True)
        )

    def take(self, tensor: Tensor) -> Tensor:
        """Return a copy of what stays of a tensor of the old shape."""
        if self.flat is not None:
            return tensor.flatten()[self.flat.to(tensor.device)].clone()
        # The shortest selection first: the next one copies less.
        order = sorted(
            range(len(self.axes)), key=lambda axis: self.new_shape[axis] / max(self.shape[axis], 1)
        )
        taken = tensor
        for axis in order:
            index = self.axes[axis]
            if index is not None:
                taken = taken.index_select(axis, index.to(tensor.device))
        return taken.clone() if taken is tensor else taken

    def first_indices(self) -> Tensor:
        """Return the indices of the first axis that stay, in the order of what is left."""
        if self.flat is not None:
            per_row = torch.Size(self.shape[1:]).numel()
            rows = self.flat.reshape(len(self.flat), -1)[:, 0]
            return torch.div(rows, per_row, rounding_mode="floor")
        index = self.axes[0]
        return torch.arange(self.shape[0]) if index is None else index

    def places(self) -> Tensor:
        """Return the flat places of what stays (int64), in the new shape."""
        if self.flat is not None:
            return self.flat
        return self.take(torch.arange(torch.Size(self.shape).numel()).view(self.shape))


Slices = dict[str, Kept]
"""By the name of a parameter or buffer that gets smaller, what stays of it."""


def flat_places(slices: Mapping[str, Kept]) -> dict[str, Tensor]:
    """Return the flat places by name, as `Kept.places` does."""
    return {name: kept.places() for name, kept in slices.items()}
