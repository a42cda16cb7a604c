"""Read and set the arguments of nodes that say sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["counts_of", "given_arguments", "is_shape", "number_of", "set_shape"]


def counts_of(kept: Tensor, node: fx.Node, dim: int) -> list[int]:
    """Count the entries that stay in each of the parts that a node gives."""
    bounds = torch.tensor([0, *(part.shape[dim] for part in node.meta["val"])]).cumsum(0).tolist()
    return [int(kept[low:high].sum()) for low, high in itertools.pairwise(bounds)]


def set_shape(node: fx.Node, kept: Sequence[Tensor | None]) -> None:
    """Set the numbers of a shape that are other ones now."""
    packed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
    sizes: list[Any] = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
    if len(sizes) != len(kept):
        return
    for axis, marks in enumerate(kept):
        if marks is not None and sizes[axis] != -1:
            sizes[axis] = int(marks.sum())
    node.args = (node.args[0], tuple(sizes)) if packed else (node.args[0], *sizes)


def is_shape(x: Any) -> bool:
    """Whether a node yields the whole shape of a tensor."""
    if not isinstance(x, fx.Node):
        return False
    if x.op == "call_method" and x.target == "size":
        return len(x.args) == 1 and not x.kwargs
    return bool(x.target is getattr and len(x.args) == 2 and x.args[1] == "shape")


def number_of(x: Any) -> Any:
    """Return the number that a node yields, such as half a size; anything else as it is."""
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return value if type(value) is int else x


def given_arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """Return the arguments after the first, by name, however they were written."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
