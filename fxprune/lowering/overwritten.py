"""Find the parameters that a network overwrites in each call: a mask of them would have no effect."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, fx

from fxprune.capture.module import OpenGraph
from fxprune.capture.tracer.assigned_data import assign_data_, attributes_behind
from fxprune.capture.tracer.spelling import called
from fxprune.lowering.aliases import Memory

__all__ = ["attribute_at", "overwritten_tensors"]

OVERWRITES = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_"))
ITSELF = frozenset(("data", "detach"))
KEEPS_ZEROS = frozenset(
    """
    abs bfloat16 clone contiguous data detach div double float half hardshrink itruediv mul nan_to_num
    neg normalize relu renorm round sign softshrink sqrt tanh to tril triu truediv type type_as
    """.split()
)
PRODUCTS = frozenset(("mul", "imul", "mul_"))
SUMS = frozenset("add iadd isub lerp sub".split())
CLAMPS = frozenset("clamp clamp_max clamp_min clip".split())
FILLS = frozenset("fill fill_diagonal index_fill masked_fill setitem".split())


def overwritten_tensors(gm: OpenGraph) -> list[tuple[Tensor, list[Tensor]]]:
    """Find the attributes that a node writes to, in full or in part, so that zeros do not stay zeros.

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
    found, memory = [], Memory(gm)
    for node in gm.graph.nodes:
        if node.target is assign_data_:
            own: Any = node.args[0]
            sources, harmless = [node], _keeps_zeros(node.args[1], own)
        else:
            own, whole = _attribute_under(memory, node)
            sources = list(node.all_input_nodes)[1:]
            harmless = own is None or _leaves_zeros(node, own, whole)
        if not harmless:
            reads = [attribute_at(gm, name) for name in attributes_behind(*sources)]
            found.append((attribute_at(gm, str(own.target)), reads))
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
    if name in SUMS:
        return len(new.args) > 1 and all(_keeps_zeros(term, own) for term in new.args[:2])
    if name in CLAMPS:
        return _includes_zero(new) and _keeps_zeros(new.args[0], own)
    return name in KEEPS_ZEROS and bool(new.args) and _keeps_zeros(new.args[0], own)


def _attribute_under(memory: Memory, node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The attribute into whose memory a node writes, and whether it sees all of it as it is."""
    views = memory.views(node)
    if not views or views[-1].op != "get_attr":
        return None, False
    val, whole = views[0].meta["val"], views[-1].meta["val"]
    is_tensor = isinstance(val, Tensor) and isinstance(whole, Tensor)
    return views[-1], is_tensor and (val.shape, val.stride()) == (whole.shape, whole.stride())


def _leaves_zeros(node: fx.Node, own: fx.Node, whole: bool) -> bool:
    """Whether what a node writes into a parameter is zero where the parameter is, or zero throughout."""
    if "out" in node.kwargs:
        return whole and _keeps_zeros(node, own)
    name, value = called(node).removesuffix("_"), node.args[-1] if len(node.args) > 1 else None
    if name in ("copy", "set"):
        return whole and _keeps_zeros(value, own)
    if called(node) in OVERWRITES and whole:
        return False
    if name in FILLS:
        return isinstance(value, int | float) and value == 0
    if name in SUMS:
        return whole and _keeps_zeros(value, own)
    if name in CLAMPS:
        return _includes_zero(node)
    return name in KEEPS_ZEROS or name in PRODUCTS or name == "zero"


def _includes_zero(clamp: fx.Node) -> bool:
    """Whether the bounds between which a node keeps numbers leave zeros as they are."""
    name, own = called(clamp).removesuffix("_"), {"clamp_min": (1, None), "clamp_max": (None, 1)}
    low, high = (
        clamp.args[place] if place is not None and len(clamp.args) > place else clamp.kwargs.get(bound)
        for place, bound in zip(own.get(name, (1, 2)), ("min", "max"), strict=True)
    )
    below = low is None or (isinstance(low, int | float) and low <= 0)
    return below and (high is None or (isinstance(high, int | float) and high >= 0))
