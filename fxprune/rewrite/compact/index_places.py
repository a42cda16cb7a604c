"""Let nodes that pick channels by a list of places, or write there, find those that are left."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.tracer.spelling import called
from fxprune.rewrite.compact.size_arguments import number_of

__all__ = ["list_places", "new_places", "pick_by_entry", "roll_places", "use_places"]

KNOWN = frozenset(
    """
    add arange argsort cat clone contiguous detach expand flatten flip floordiv getitem int long mod mul neg
    permute repeat repeat_interleave reshape roll squeeze stack sub tensor to transpose unsqueeze view
    """.split()
)
"""Operations whose result is the same in every run where their arguments are."""


def new_places(gm: nn.Module, item: Any, kept: Tensor) -> list[int] | None:
    """Return what a list of places along an axis picks of the ``kept`` entries (bool), by their new places.

    Args:
        gm: the network, which holds the tensors among the places.
        item: a list, a tensor, or a node that yields one; truth values mark places.
        kept: by place, whether the entry is left.

    Returns:
        The places, without those of entries that are gone; ``None`` if ``item`` is no list of one axis, or
        is not known before the network runs.

    >>> new_places(nn.Module(), [3, 1, 0, 2], torch.tensor([True, False, True, True]))
    [2, 0, 1]
    """
    numbers = _numbers(gm, item)
    if numbers is None or numbers.dim() != 1 or numbers.is_floating_point():
        return None
    if numbers.dtype == torch.bool:
        numbers = numbers.nonzero().flatten()
    places = (numbers % len(kept)).cpu()
    return [int(kept[:place].sum()) for place in places.tolist() if kept[place]]


def list_places(node: fx.Node, items: list[Any], known: Sequence[Tensor | None]) -> None:
    """List the places where a node writes what is left of a parameter, in a constant that stays as long.

    ``items``: the slices that it writes at; ``known``: by axis of the parameter, what is left (bool).
    """
    made: Any = node.args[0]
    shape = made.meta["val"].shape
    items = items + [slice(None)] * (len(shape) - len(items))
    marked = [(axis, marks) for axis, marks in enumerate(known) if marks is not None]
    if len(known) == len(shape) and len(marked) == 1:
        ((axis, marks),) = marked
        bounds = [getattr(items[axis], part) for part in ("start", "stop", "step")]
        places = torch.arange(shape[axis])[slice(*map(number_of, bounds))]
        if len(places) == len(marks):
            items[axis] = places[marks].tolist()
            node.args = (made, tuple(items), node.args[2])


def roll_places(node: fx.Node, dim: int, places: list[int]) -> None:
    """Let a node pick a list of places along an axis, instead of rolling it."""
    source: Any = node.args[0]
    if node.op == "call_function":
        node.target, node.args = operator.getitem, (source, (*(slice(None),) * dim, places))
    else:
        with node.graph.inserting_before(node):
            listed = node.graph.call_method("new_tensor", (source, places), {"dtype": torch.int64})
        node.target, node.args = "index_select", (source, dim, listed)
    node.kwargs = {}


def use_places(node: fx.Node, index: fx.Node, places: list[int]) -> None:
    """Let a node pick a list of places, or write there, instead of those of ``index``."""
    with node.graph.inserting_before(node):
        listed = node.graph.call_method("new_tensor", (index, places))
    node.replace_input_with(index, listed)


def pick_by_entry(node: fx.Node, index: fx.Node, kept: Tensor) -> None:
    """Let ``gather`` and the like read each entry at the new place of the one that it read before."""
    after = (kept.cumsum(0) - 1).clamp(min=0).tolist()
    with node.graph.inserting_before(node):
        table = node.graph.call_method("new_tensor", (index, after))
        renumbered = node.graph.call_function(operator.getitem, (table, index))
    renumbered.meta = dict(index.meta)
    node.replace_input_with(index, renumbered)


def _numbers(gm: nn.Module, item: Any) -> Tensor | None:
    """The numbers of a constant that the code writes down, holds, or makes of such."""
    try:
        found = fx.node.map_arg(item, lambda node: _constant(gm, node))
    except LookupError:
        return None
    return torch.as_tensor(found) if isinstance(found, (list, Tensor)) else None


def _constant(gm: nn.Module, node: fx.Node) -> Any:
    """Compute the tensor that a node yields in every run; LookupError if that is not known."""
    target: Any = node.target
    if node.op == "get_attr":
        owner, _, leaf = str(target).rpartition(".")
        found = getattr(gm.get_submodule(owner), leaf, None)
        if isinstance(found, Tensor) and not isinstance(found, nn.Parameter):
            return found
    if node.op not in ("call_function", "call_method") or called(node) not in KNOWN:
        raise LookupError(node.name)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: _constant(gm, each))
    return (
        getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    )
