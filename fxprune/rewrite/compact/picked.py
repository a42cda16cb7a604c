"""Rewrite nodes that pick channels by an index, roll them, or fill some of them."""

from __future__ import annotations

import torch
from torch import fx

from fxprune.graph import ir
from fxprune.rewrite.compact.cut import Cut, UnevenCut
from fxprune.rewrite.compact.index_places import new_places, pick_by_entry, roll_places, use_places
from fxprune.rewrite.compact.size_arguments import given_arguments

__all__ = ["FILLS", "PICKS", "move_places"]

PICKS = frozenset(("index_select", "gather", "roll", "take_along_dim"))
FILLS = frozenset(f"{name}{end}" for name in ("index_fill", "scatter", "scatter_add") for end in ("", "_"))


def move_places(gm: fx.GraphModule, cut: Cut, node: fx.Node, source: ir.Value | None, name: str) -> None:
    """Move the places that an index of one axis lists, or holds by entry, if the axis shrinks."""
    if source is None or not cut.shrinks(source):
        return
    if name == "roll":
        _roll(gm, cut, node, source)
        return
    own = ("indices", "dim") if name == "take_along_dim" else ("dim", "index")
    given = given_arguments(node, *own)
    dim, index = given.get("dim"), given.get("index", given.get("indices"))
    dim = dim % len(source.shape) if isinstance(dim, int) else -1
    if dim < 0 or (kept := cut.kept_along(source, dim)) is None:
        return
    by_entry = name in ("gather", "take_along_dim")
    places = None if by_entry or name.startswith("scatter") else new_places(gm, index, kept)
    if not isinstance(index, fx.Node) or (places is None and not by_entry):
        raise UnevenCut(f"{node.name}: an index along channels", cut.labels_of(source))
    if places is None:
        pick_by_entry(node, index, kept)
    else:
        use_places(node, index, places)


def _roll(gm: fx.GraphModule, cut: Cut, node: fx.Node, source: ir.Value) -> None:
    """Let channels that are left take the places that they had among all."""
    given = given_arguments(node, "shifts", "dims")
    shifts, dims = ([x] if isinstance(x, int) else list(x) for x in (given["shifts"], given.get("dims", ())))
    axes = [dim % len(source.shape) for dim in dims]
    kept = [cut.kept_along(source, axis) for axis in axes]
    if all(marks is None for marks in kept) and axes:
        return
    if len(axes) != 1 or kept[0] is None or not isinstance(shifts[0], int):
        raise UnevenCut(f"{node.name}: channels rolled with others", cut.labels_of(source))
    rolled = torch.arange(len(kept[0])).roll(shifts[0])
    roll_places(node, axes[0], new_places(gm, rolled, kept[0]) or [])
