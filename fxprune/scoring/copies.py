"""Follow the copies that code makes of weights on their way to a product.

``einsum`` lays weights of three axes out anew, and ``weight.to(x.dtype)`` makes another type of them. Copies
are followed for as long as one mode watches: where a graph runs node by node, within a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Copies", "Layout", "Step", "is_repeated", "places_in"]

aten = torch.ops.aten
COPYING = (aten.clone.default, aten._to_copy.default)


@dataclass(frozen=True)
class Layout:
    """Say how a tensor lies in its storage."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))

    def within(self, storage: Tensor) -> Tensor:
        """The tensor in a flat storage."""
        return storage.as_strided(self.shape, self.stride, self.offset)

    @property
    def span(self) -> int:
        """Entries of the storage up to the last one of the tensor."""
        ends = [(size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)]
        return self.offset + sum(ends) + 1


Step = tuple[Layout, Layout]
"""A copy: where its entries were, and where they are."""


def places_in(weight: Tensor, steps: Sequence[Step], layout: Layout) -> Tensor:
    """Return the place in the flattened weight of every entry of a tensor, in the tensor's shape.

    Args:
        weight: a parameter.
        steps: the copies that lead to the storage in which the tensor lies; none for that of the weight.
        layout: of the tensor.

    >>> weight = torch.zeros(2, 3)
    >>> copied = weight.t().contiguous()
    >>> places_in(weight, [(Layout.of(weight.t()), Layout.of(copied))], Layout.of(copied[0]))
    tensor([0, 3])
    """
    places = torch.full((weight.untyped_storage().nbytes() // weight.element_size(),), -1)
    Layout.of(weight).within(places).copy_(torch.arange(weight.numel()).view(weight.shape))
    return _followed(places, steps, layout)


def is_repeated(steps: Sequence[Step], layout: Layout) -> bool:
    """Return whether a tensor in a copy has the same entries of the weight all along its first axis.

    >>> weight = torch.zeros(2, 3)
    >>> spread = weight.expand(4, 2, 3)
    >>> is_repeated([(Layout.of(spread), Layout.of(spread.contiguous()))], Layout.of(spread.contiguous()))
    True
    """
    if not any(step == 0 for source, _ in steps for step in source.stride):
        return False
    found = _followed(torch.arange(steps[0][0].span), steps, layout)
    return bool((found == found[:1]).all())


def _followed(places: Tensor, steps: Sequence[Step], layout: Layout) -> Tensor:
    """Follow ``places``, from where the first copy was made of, to the entries of a tensor."""
    for source, result in steps:
        copied = torch.full((result.span,), -1)
        result.within(copied).copy_(source.within(places))
        places = copied
    return layout.within(places)


class Copies:
    """Knows the weights by their storages, and the copies that were made of them while these are alive."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        # Kept, for memory that is given back is used again by other tensors.
        self.kept = [weight.untyped_storage() for weight in weights.values()]
        self.names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self.copies: dict[int, tuple[StorageWeakRef, str, tuple[Step, ...]]] = {}

    def origin(self, operand: Any) -> tuple[str, tuple[Step, ...]] | None:
        """The weight that a tensor is a part of, and the copies between them; None for any other tensor."""
        if not isinstance(operand, Tensor):
            return None
        place = operand.untyped_storage().data_ptr()
        if place in self.names:
            return self.names[place], ()
        # Memory is used again by other tensors.
        alive, name, steps = self.copies.get(place, (None, "", ()))
        return (name, steps) if alive is not None and not _is_gone(alive) else None

    def note(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """Remember what an operation has made, if it is a copy of a weight; forget one that it writes to."""
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self.copies.pop(args[0].untyped_storage().data_ptr(), None)
        origin = self.origin(args[0]) if func in COPYING else None
        if origin is not None:
            name, steps = origin
            storage = result.untyped_storage()
            step = (Layout.of(args[0]), Layout.of(result))
            self.copies[storage.data_ptr()] = (_watched(storage), name, (*steps, step))


def _watched(storage: Any) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]
