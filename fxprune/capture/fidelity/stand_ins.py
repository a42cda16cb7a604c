"""Replace a call that training alone may make by one for evaluation.

In: a node of the trace in training that draws random numbers, or writes into a tensor. Out: a graph that
gives a value of the same shape without doing so, or a call that makes a new tensor. Code behind it runs in
both modes, and evaluation uses nothing of what comes out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxprune.capture.tracer.spelling import DRAWN_INTO, IN_PLACE_OPERATORS, called, changes_input
from fxprune.torch_private import pytree

__all__ = ["memories", "not_in_place", "stand_in", "with_argument", "without_draws"]

SHAPED_LIKE_FIRST = frozenset(
    ("bernoulli", "gumbel_softmax", "native_dropout", "poisson", "rand_like", "randint_like", "randn_like")
)
SWITCHED: dict[str, tuple[int, str, Any]] = {
    "alpha_dropout": (2, "training", False),
    "dropout": (2, "training", False),
    "dropout1d": (2, "training", False),
    "dropout2d": (2, "training", False),
    "dropout3d": (2, "training", False),
    "feature_alpha_dropout": (2, "training", False),
    "rrelu": (3, "training", False),
    "scaled_dot_product_attention": (4, "dropout_p", 0.0),
}
"""By the name of a function: the place and name of an argument, and its value where nothing is drawn."""
OF_A_SIZE: dict[str, Any] = {"rand": torch.ones, "randn": torch.ones, "randperm": torch.arange}


def stand_in(node: fx.Node, inputs: list[fx.Node]) -> fx.Graph | None:
    """Return a graph of ``inputs``, with the value that stands for a random one as its one output; or None.

    No constant where there is a tensor of that shape: constants would be computed with.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> noise = graph.call_function(torch.randn_like, (x,))
    >>> noise.meta["val"] = torch.ones(2, 3, device="meta")
    >>> [str(part.target) for part in stand_in(noise, [x]).nodes]
    ['x', 'to', 'output']
    """
    value, name = node.meta.get("val"), called(node)
    draws = name in DRAWN_INTO and node.op == "call_method"
    if not isinstance(value, Tensor) or (changes_input(node) and not draws):
        return None
    graph = fx.Graph()
    copies = {x: graph.placeholder(x.name) for x in inputs}
    for x, made in copies.items():
        made.meta.update(x.meta)
    first: Any = node.args[0] if node.args else None
    if (draws or name in SHAPED_LIKE_FIRST) and isinstance(first, fx.Node):
        found = graph.call_method("to", (copies[first], value.dtype))
    elif name in OF_A_SIZE:
        options = {key: x for key, x in node.kwargs.items() if key in ("device", "size")}
        arguments = map_arg((node.args, {**options, "dtype": value.dtype}), copies.__getitem__)
        found = graph.call_function(OF_A_SIZE[name], *arguments)
    else:
        return None
    found.meta["val"] = value
    graph.output((found,)).meta["val"] = (value,)
    return graph


def without_draws(node: fx.Node) -> tuple[int | str, Any] | None:
    """Return the argument that makes a call draw random numbers, by place or name, and its other value.

    >>> graph = fx.Graph()
    >>> without_draws(graph.call_function(torch.nn.functional.dropout, (graph.placeholder("x"), 0.5, True)))
    (2, False)
    """
    if node.op != "call_function" or called(node) not in SWITCHED:
        return None
    place, name, off = SWITCHED[called(node)]
    if name in node.kwargs:
        return name, off
    return (place, off) if len(node.args) > place else None


def with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another value at a place or by a name.

    >>> with_argument((1, 2), {"p": 0.5}, 1, "two"), with_argument((1, 2), {"p": 0.5}, "p", 0.0)
    (((1, 'two'), {'p': 0.5}), ((1, 2), {'p': 0.0}))
    """
    if isinstance(key, str):
        return args, {**kwargs, key: value}
    return (*args[:key], value, *args[key + 1 :]), kwargs


def not_in_place(node: fx.Node) -> tuple[str, Any, dict[str, Any]] | None:
    """Return the op, target and keyword arguments that make a new tensor where ``node`` writes into one.

    None if there are none, or if what is written is read by another name.
    """
    first, value = (node.args[0] if node.args else None), node.meta.get("val")
    if not (isinstance(first, fx.Node) and isinstance(value, Tensor) and changes_input(node)):
        return None
    old, kwargs, name = first.meta.get("val"), dict(node.kwargs), called(node)
    same = isinstance(old, Tensor) and old.shape == value.shape
    operands = [x.meta.get("val") for x in node.all_input_nodes]
    same = same and all(x.dtype == value.dtype for x in operands if isinstance(x, Tensor) and x.dim())
    if not same or name in DRAWN_INTO or _is_read_again(node, first):
        return None
    if node.target in IN_PLACE_OPERATORS and hasattr(operator, name[1:]):
        return "call_function", getattr(operator, name[1:]), kwargs
    if kwargs.get("inplace") is True:
        return node.op, node.target, {**kwargs, "inplace": False}
    if node.op == "call_method" and name.endswith("_") and callable(getattr(Tensor, name[:-1], None)):
        return "call_method", name[:-1], kwargs
    return None


def _is_read_again(node: fx.Node, first: fx.Node) -> bool:
    """Whether code after ``node`` reads the memory that it wrote by a name from before."""
    written, earlier, after = set(memories(first)), set(), False
    for other in node.graph.nodes:
        if after and any(x in earlier and not written.isdisjoint(memories(x)) for x in other.all_input_nodes):
            return True
        after = after or other is node
        if not after:
            earlier.add(other)
    return first.op in ("placeholder", "get_attr")  # the caller or the model reads it


def memories(nodes: fx.Node | Iterable[Any]) -> Iterable[int]:
    """Name the memory of the values of nodes; a view has that of its base."""
    for node in pytree.tree_leaves(nodes):
        for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(node, fx.Node) else ():
            if isinstance(value, Tensor):
                yield value.untyped_storage()._cdata
