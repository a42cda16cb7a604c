"""Let a mean, a variance or a sum of squares in a norm give what it gave before some channels went.

These were zero. What is left of them when a mean is subtracted is not: its square is that of the mean.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from fxprune.lowering.norm_statistics import PAIRS, SPREADS, centre_of, correction_of, dims_of

__all__ = ["narrow_statistic"]


def narrow_statistic(node: fx.Node, share: float, axis: int, size: int) -> None:
    """Rewrite a reduction in place: the ``share`` is left of the ``size`` entries along ``axis``."""
    name = str(getattr(node.target, "__name__", node.target))
    if name in SPREADS:
        _spread(node, name, share, size)
        return
    if name != "mean":
        return  # zeros add nothing to a sum, or to a length
    centre, steps = centre_of(node, axis), _Steps(node)
    result = steps.call(operator.mul, node, share)
    if centre is not None:
        square = steps.call(operator.mul, centre[1], centre[1])
        result = steps.call(operator.add, result, steps.call(operator.mul, square, 1.0 - share))
    steps.stand_for(node, result)


def _spread(node: fx.Node, name: str, share: float, size: int) -> None:
    """Rewrite a variance or a deviation, perhaps with the mean: from those of what is left."""
    correction = correction_of(node)
    scale = size / (size - correction) if correction else 1.0
    steps = _Steps(node)
    source = node.kwargs.get("input", node.args[0] if node.args else None)
    both = steps.call(torch.var_mean, source, dim=dims_of(node), correction=0, keepdim=True)
    spread, mean = steps.call(operator.getitem, both, 0), steps.call(operator.getitem, both, 1)
    within = steps.call(operator.mul, spread, share * scale)
    # Scaled before it is squared: a square of the mean alone may be too large for half precision.
    part = steps.call(operator.mul, mean, math.sqrt(share * (1 - share) * scale))
    between = steps.call(operator.mul, part, part)
    result = steps.call(operator.add, within, between)
    if name.startswith("std"):
        result = steps.call(torch.sqrt, result)
    whole = steps.call(operator.mul, mean, share) if name in PAIRS else None
    if whole is None:
        steps.stand_for(node, result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result if user.args[1] == 0 else whole)
            node.graph.erase_node(user)
    node.graph.erase_node(node)


class _Steps:
    """Adds nodes behind another one, each behind the one before, with names that tell where they belong."""

    def __init__(self, node: fx.Node) -> None:
        self.node, self.last, self.new = node, node, set[fx.Node]()

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        graph, name = self.node.graph, f"narrowed_{self.node.name}"
        name += f"_{len(self.new)}" if self.new else ""
        with graph.inserting_after(self.last):
            self.last = graph.create_node("call_function", function, args, kwargs, name=name)
        val = self.node.meta.get("val")
        self.last.meta = {**self.node.meta, "val": val[0] if isinstance(val, (tuple, list)) else val}
        self.new.add(self.last)
        return self.last

    def stand_for(self, node: fx.Node, result: fx.Node) -> None:
        """Let the result take the place of a node, but for the nodes that it is computed from."""
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in self.new)
