"""Find the parameters that a network overwrites in each call: a mask of them would have no effect."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, fx

from fxprune.capture.module import OpenGraph
from fxprune.capture.tracer.assigned_data import attributes_behind
from fxprune.capture.tracer.spelling import called
from fxprune.lowering.aliases import written

__all__ = ["attribute_at", "overwritten_tensors"]

OVERWRITES = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_"))
ITSELF = frozenset(("data", "detach"))


def overwritten_tensors(gm: OpenGraph) -> list[tuple[Tensor, list[Tensor]]]:
    """Find the attributes that a node writes in full, with numbers that do not depend on them.

    Beside each are the attributes that its numbers are computed from.

    Example:
        >>> import torch
        >>> class Fused(torch.nn.Linear):
        ...     def forward(self, x):
        ...         self.weight.data.copy_(self.bias[:, None].expand(-1, 4))
        ...         return super().forward(x)
        >>> from fxprune.capture import capture
        >>> [(tuple(tensor.shape), len(sources)) for tensor, sources
        ...  in overwritten_tensors(capture(Fused(4, 4), torch.ones(1, 4)))]
        [((4, 4), 1)]
    """
    found = []
    for node in gm.graph.nodes:
        if called(node) not in OVERWRITES or written(node, gm) is None:
            continue
        place = node.args[0]
        while isinstance(place, fx.Node) and _is_itself(place):
            place = place.args[0]
        if isinstance(place, fx.Node) and place.op == "get_attr":
            reads = attributes_behind(*(item for item in node.args[1:2] if isinstance(item, fx.Node)))
            if place.target not in reads:
                found.append(
                    (attribute_at(gm, str(place.target)), [attribute_at(gm, name) for name in reads])
                )
    return found


def attribute_at(root: Any, path: str) -> Any:
    """Return what a path of names leads to."""
    return functools.reduce(getattr, path.split("."), root)


def _is_itself(node: fx.Node) -> bool:
    return (node.args[1] if called(node) == "getattr" else called(node)) in ITSELF
