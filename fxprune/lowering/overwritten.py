"""Find the parameters that a network overwrites in each call: a mask of them would have no effect."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, fx

from fxprune.capture.module import OpenGraph
from fxprune.capture.tracer.assigned_data import assign_data_, attributes_behind
from fxprune.capture.tracer.spelling import called
from fxprune.lowering.aliases import written

__all__ = ["attribute_at", "overwritten_tensors"]

OVERWRITES = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_"))
ITSELF = frozenset(("data", "detach"))
KEEPS_ZEROS = frozenset(
    """
    abs bfloat16 clone contiguous data detach div double float half hardshrink itruediv mul neg normalize
    renorm round sign softshrink tanh to truediv type type_as
    """.split()
)
PRODUCTS = frozenset(("mul", "imul", "mul_"))


def overwritten_tensors(gm: OpenGraph) -> list[tuple[Tensor, list[Tensor]]]:
    """Find the attributes that a node writes in full, with numbers that do not depend on them.

    Those that are assigned what code makes of themselves are among them, unless zeros stay zeros.
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
        if node.target is assign_data_ and not _keeps_zeros(node.args[1], node.args[0]):
            reads = attributes_behind(node)
            found.append((attribute_at(gm, str(node.args[0].target)), [attribute_at(gm, n) for n in reads]))
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


def _keeps_zeros(new: Any, own: fx.Node) -> bool:
    """Whether what is made of a parameter is zero wherever that is, as far as the operations tell."""
    if not isinstance(new, fx.Node) or new.op == "get_attr":
        return isinstance(new, fx.Node) and new.target == own.target
    name = new.args[1] if called(new) == "getattr" else called(new)
    if name in PRODUCTS:
        return any(_keeps_zeros(factor, own) for factor in new.args[:2])
    if name in ("clamp", "clip"):
        low, high = (
            new.args[place] if len(new.args) > place else new.kwargs.get(bound)
            for place, bound in ((1, "min"), (2, "max"))
        )
        below = low is None or (isinstance(low, int | float) and low <= 0)
        above = high is None or (isinstance(high, int | float) and high >= 0)
        return below and above and _keeps_zeros(new.args[0], own)
    return name in KEEPS_ZEROS and bool(new.args) and _keeps_zeros(new.args[0], own)


def _is_itself(node: fx.Node) -> bool:
    if not node.op.startswith("call"):
        return False
    return (node.args[1] if called(node) == "getattr" else called(node)) in ITSELF
