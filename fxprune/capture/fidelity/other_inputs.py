"""Make the inputs of the traces that a capture is compared with: other sizes, types and numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.capture.tracer.meta_values import map_structure

__all__ = ["OTHER_TYPE", "Inputs", "extent", "plain_values"]

OTHER_TYPE = {
    torch.float32: torch.float64,
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex64,
}


@dataclass
class Inputs:
    """Arguments of a model as meta tensors; ``examples`` are the numbers of some, by their ``id``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    examples: Mapping[int, Tensor] = field(default_factory=dict)

    def changed(
        self,
        *,
        batch: bool = False,
        types: bool = False,
        images: bool = False,
        numbers: Collection[Any] | None = None,
    ) -> Inputs:
        """The inputs with one more sample, in another precision, or twice as large.

        ``numbers``: those that the model reads from its inputs; integers are larger by one, and so are the
        axes that are as long as one of those numbers says.
        """
        size = self._batch()
        examples: dict[int, Tensor] = {}
        dtypes = OTHER_TYPE if types else {}

        def change(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            shape = list(value.shape)
            if batch and shape and shape[0] == size:
                shape[0] += 1
            for dim in extent(value) if images else ():
                shape[dim] *= 2
            for dim, length in enumerate(value.shape) if numbers is not None else ():
                shape[dim] += length in (numbers or ()) and not (dim == 0 and length == size)
            made = torch.empty(shape, dtype=dtypes.get(value.dtype, value.dtype), device="meta")
            if id(value) in self.examples:
                example = _repeated(self.examples[id(value)], shape)
                same = numbers is None or example.dtype == torch.bool or shape != list(value.shape)
                examples[id(made)] = example if same else example + 1
            return made

        return Inputs(map_structure(change, self.args), map_structure(change, dict(self.kwargs)), examples)

    def has_images(self) -> bool:
        """Whether an argument is an image, a clip or a sequence of indices, which come in several sizes."""
        found: list[bool] = []
        map_structure(
            lambda x: found.append(bool(extent(x))) if isinstance(x, Tensor) else None,
            (self.args, dict(self.kwargs)),
        )
        return any(found)

    def _batch(self) -> int | None:
        sizes: list[int] = []
        inputs = (self.args, dict(self.kwargs))
        map_structure(
            lambda x: sizes.append(x.shape[0]) if isinstance(x, Tensor) and x.dim() else None, inputs
        )
        return sizes[0] if sizes else None


def extent(tensor: Tensor) -> range:
    """The dimensions of an image or a clip, or the length of a sequence of indices."""
    if tensor.is_floating_point():
        return range(2, tensor.dim()) if tensor.dim() >= 4 else range(0)
    return range(1, 2) if tensor.dim() == 2 else range(0)


def _repeated(numbers: Tensor, shape: list[int]) -> Tensor:
    """Numbers in a larger shape: the first ones once more at the end."""
    for dim, size in enumerate(shape):
        numbers = numbers.index_select(dim, torch.arange(size) % max(1, numbers.shape[dim]))
    return numbers


def plain_values(reads: Collection[fx.Node]) -> set[Any]:
    """Gather the numbers that nodes read."""
    found: set[Any] = set()
    map_structure(found.add, [node.meta["val"] for node in reads])
    return found
