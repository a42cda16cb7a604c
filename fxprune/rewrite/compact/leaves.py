"""Open layers that hold several weights: their own arithmetic takes their place in the graph.

Only then can channels inside of them go: the attention of torch.nn asks for one width everywhere, and code
that :func:`fxprune.capture` did not enter has sizes of its own.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.capture import CaptureError, CarriedOver, capture_leaf, capture_part
from fxprune.capture.attributes import Attributes
from fxprune.capture.errors import users_level
from fxprune.capture.hooks import keeps_hooks
from fxprune.capture.leaves import is_leaf
from fxprune.capture.module import OpenGraph, leaf_attributes
from fxprune.capture.tracer.trace import remove_dead_code
from fxprune.rewrite.compact.kept import Slices
from fxprune.rewrite.compact.modules import unsizeable
from fxprune.torch_private import pytree

__all__ = ["HeldByLeaf", "StaysModule", "StaysWhole", "first_held", "open_leaf", "why_held"]

LAYERS = (
    nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer, nn.TransformerDecoder,
    nn.Transformer,
)  # fmt: skip
"""Layers that consist of others; what their forward does is traced."""

GIVEN_SIZES = "it is given numbers, such as sizes, for which alone its graph would hold"


class HeldByLeaf(Exception):
    """Raised where layers of several weights would have to get smaller inside; ``paths`` are their own."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(*paths)
        self.paths = paths


class StaysWhole(Exception):
    """Raised for a module that no graph can take the place of; the message says why."""


class StaysModule(StaysWhole):
    """Raised for a module whose calls must stay: it goes on from an earlier call, is given sizes, or decides
    by numbers.
    """


def first_held(
    gm: fx.GraphModule, slices: Slices, whole: Collection[str], closed: Collection[str]
) -> str | None:
    """Return a parameter that loses entries in a layer that cannot get smaller, if there is one.

    ``whole``: the paths of layers that cannot be opened; ``closed``: those that may call smaller ones.
    `HeldByLeaf` asks for others to be opened.
    """
    odd = unsizeable(gm, slices, closed)
    found = dict.fromkeys(leaf for name in odd if (leaf := _leaf_of(gm, name)) is not None)
    if leaves := [leaf for leaf in found if leaf not in whole]:
        raise HeldByLeaf(leaves)
    return odd[0] if odd else None


def why_held(name: str, whole: Mapping[str, str]) -> str:
    """Say why a parameter cannot get smaller; ``whole``: by path of a layer, why it cannot be opened."""
    for path, reason in whole.items():
        if name.startswith(f"{path}."):
            return f"{path} stays whole: {reason}"
    return f"{name}: a module of unknown kind holds it"


def _leaf_of(gm: fx.GraphModule, name: str) -> str | None:
    """Return the path of the layer that holds a parameter and can be opened, if there is one."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and name.startswith(f"{node.target}."):
            module = gm.get_submodule(str(node.target))
            nodes = [
                user for user in gm.graph.nodes if user.op == "call_module" and user.target == node.target
            ]
            if (isinstance(module, LAYERS) or not is_leaf(module)) and not keeps_hooks(module):
                return str(node.target)
            if isinstance(module, nn.MultiheadAttention) and all(_is_plain(user, module) for user in nodes):
                return str(node.target)
    return None


def open_leaf(gm: fx.GraphModule, path: str) -> None:
    """Replace the calls of a layer in place.

    The module stays where it is, with its parameters: nothing calls it any more. A warning says what
    a user's module did, and its graph does not; the layers of torch.nn do the same as before.
    `StaysWhole` is raised where its inside cannot be traced, and `StaysModule` for a user's module that a
    graph cannot take the place of, though there is one.
    """
    module = gm.get_submodule(path)
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and node.target == path]
    if isinstance(module, nn.MultiheadAttention):
        for node in calls:
            _attention(gm, node, module)
    else:
        inside = _inside if isinstance(module, LAYERS) else _own_code
        inner = [inside(gm, node, module) for node in calls]
        for node, graph in zip(calls, inner, strict=True):
            _inline(gm, node, graph, path)
    remove_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()


# -- layers of layers ---------------------------------------------------------------------------------
def _inside(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> OpenGraph:
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Mapping[str, Any] = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the parts
    try:
        return capture_leaf(module, args, kwargs, leaf_attributes(gm, node))
    except CaptureError as error:
        raise StaysWhole(str(error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _own_code(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> OpenGraph:
    """The graph of a user's module, with a warning that says what it does not do; or `StaysWhole`."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Mapping[str, Any] = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        inner, note = capture_part(module, args, kwargs, leaf_attributes(gm, node))
    except CarriedOver as error:
        raise StaysModule(str(error)) from error
    except CaptureError as error:
        is_seen = _is_seen(module, args, kwargs, leaf_attributes(gm, node))
        raise (StaysModule if is_seen else StaysWhole)(str(error)) from error
    given = [leaf for source in node.all_input_nodes for leaf in pytree.tree_leaves(source.meta["val"])]
    if any(map(_is_number, given)):  # such as sizes: its own graph would hold for these alone
        raise (StaysModule if _has_layers_alone(inner) else StaysWhole)(GIVEN_SIZES)
    if note:
        told = f"compact: {type(module).__name__} was kept whole, and is a graph now: {note}"
        warnings.warn(told, stacklevel=users_level())
    return inner


def _is_seen(module: nn.Module, args: Any, kwargs: Any, attributes: Mapping[str, Attributes]) -> bool:
    """Whether all of a module can be looked at that only asks whether there is something to do.

    Then channels inside of it are known to go, for whatever numbers it is given.
    """
    try:
        return _has_layers_alone(capture_leaf(module, args, kwargs, attributes))
    except CaptureError:
        return False


def _has_layers_alone(inner: OpenGraph) -> bool:
    """Whether a graph calls no module that stays whole but PyTorch's layers."""
    called = (str(one.target) for one in inner.graph.nodes if one.op == "call_module")
    return all(is_leaf(inner.get_submodule(path)) for path in called)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _adopt(gm: fx.GraphModule, inner: OpenGraph, path: str, target: str) -> str:
    """Return the name in ``gm`` of a part of ``inner``, which gets it where its module has no such part."""
    home, found = gm.get_submodule(path), _part(inner, target)
    if _part(home, target) is found:
        return f"{path}.{target}"
    name, number = target, 0
    while hasattr(home, name):
        name, number = f"{target}_{number}", number + 1
    if isinstance(found, nn.Module):
        home.add_module(name, found)
    elif isinstance(found, Tensor) and not isinstance(found, nn.Parameter):
        home.register_buffer(name, found, persistent=False)
    else:
        object.__setattr__(home, name, found)
    return f"{path}.{name}"


def _part(module: Any, target: str) -> Any:
    for atom in target.split("."):
        module = getattr(module, atom, None)
    return module


def _inline(gm: fx.GraphModule, node: fx.Node, inner: OpenGraph, path: str) -> None:
    """Copy the nodes of ``inner`` in front of ``node``, and let its result take the node's place."""
    known: dict[fx.Node, Any] = {}
    given = list(node.args)
    result: Any = None
    with gm.graph.inserting_before(node):
        for one in inner.graph.nodes:
            if one.op == "placeholder":
                default = one.args[0] if one.args else None
                known[one] = given.pop(0) if given else node.kwargs.get(str(one.target), default)
            elif one.op == "output":
                result = fx.node.map_arg(one.args[0], lambda n: known[n])
            else:
                part = one.op in ("call_module", "get_attr")
                target = _adopt(gm, inner, path, str(one.target)) if part else one.target
                args, kwargs = (fx.node.map_arg(x, lambda n: known[n]) for x in (one.args, one.kwargs))
                known[one] = gm.graph.create_node(one.op, target, args, kwargs)
                known[one].meta = dict(one.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


# -- attention ------------------------------------------------------------------------------------------
def _arguments(node: fx.Node) -> dict[str, Any]:
    names = "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal".split()
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _is_plain(node: fx.Node, m: nn.MultiheadAttention) -> bool:
    """Whether this call of an attention can be written out."""
    given = _arguments(node)
    mask = given.get("attn_mask")
    picked = all(user.target is operator.getitem and user.args[1] in (0, 1) for user in node.users)
    ranks = [given[name].meta["val"].dim() for name in ("query", "key", "value")]
    return (
        picked
        and ranks == [3, 3, 3]
        and given.get("key_padding_mask") is None
        and m.bias_k is None
        and not m.add_zero_attn
        and not keeps_hooks(m)
        and (mask is None or (isinstance(mask, fx.Node) and mask.meta["val"].dim() == 2))
    )


def _attention(gm: fx.GraphModule, node: fx.Node, m: nn.MultiheadAttention) -> None:
    """Write out projections, attention per head, and the output projection in front of ``node``."""
    given, graph, path = _arguments(node), gm.graph, str(node.target)
    mask = given.get("attn_mask")
    wanted = {int(user.args[1]): user for user in node.users}  # type: ignore[arg-type]
    with graph.inserting_before(node):
        inputs = [given[name] for name in ("query", "key", "value")]
        if not m.batch_first:
            turned = {x: graph.call_method("transpose", (x, 0, 1)) for x in inputs}
            inputs = [turned[x] for x in inputs]
        q, k, v = (
            graph.call_method("transpose", (graph.call_method("unflatten", (x, -1, (m.num_heads, -1))), 1, 2))
            for x in _projected(graph, path, m, inputs)
        )
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            mask = graph.call_function(torch.logical_not, (mask,))  # True means "may not attend" there
        weights = None
        if 1 in wanted or m.dropout > 0:
            mixed, weights = _by_hand(gm, path, m, (q, k, v), mask)
        else:
            mixed = graph.call_function(F.scaled_dot_product_attention, (q, k, v), {"attn_mask": mask})
        joined = graph.call_method("flatten", (graph.call_method("transpose", (mixed, 1, 2)), 2))
        out = graph.call_module(f"{path}.out_proj", (joined,))
        if not m.batch_first:
            out = graph.call_method("transpose", (out, 0, 1))
        if weights is not None and 1 in wanted and given.get("average_attn_weights", True):
            weights = graph.call_method("mean", (weights,), {"dim": 1})
    results = {0: out, 1: weights}
    for place, user in wanted.items():
        user.replace_all_uses_with(results[place])  # type: ignore[arg-type]
        graph.erase_node(user)
    graph.erase_node(node)


def _projected(graph: fx.Graph, path: str, m: nn.MultiheadAttention, inputs: list[fx.Node]) -> list[fx.Node]:
    """Queries, keys and values; one projection of one input is one linear layer, cut in three."""
    bias = graph.get_attr(f"{path}.in_proj_bias") if m.in_proj_bias is not None else None
    if m.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights: list[Any] = [graph.get_attr(f"{path}.{name}") for name in names]
    else:
        whole = graph.get_attr(f"{path}.in_proj_weight")
        if inputs[0] is inputs[1] is inputs[2]:
            joined = graph.call_function(F.linear, (inputs[0], whole, bias))
            return _thirds(graph, joined, -1)
        weights = _thirds(graph, whole, 0)
    biases = [None] * 3 if bias is None else _thirds(graph, bias, 0)
    return [
        graph.call_function(F.linear, (x, weight, own))
        for x, weight, own in zip(inputs, weights, biases, strict=True)
    ]


def _thirds(graph: fx.Graph, whole: fx.Node, axis: int) -> list[fx.Node]:
    parts = graph.call_function(torch.chunk, (whole, 3), {"dim": axis})
    return [graph.call_function(operator.getitem, (parts, place)) for place in range(3)]


def _by_hand(
    gm: fx.GraphModule, path: str, m: nn.MultiheadAttention, heads: tuple[fx.Node, ...], mask: fx.Node | None
) -> tuple[fx.Node, fx.Node]:
    """Attention whose weights are wanted, or dropped at random in training."""
    graph, (q, k, v) = gm.graph, heads
    scaled = graph.call_function(operator.mul, (q, (m.embed_dim // m.num_heads) ** -0.5))
    scores = graph.call_function(torch.matmul, (scaled, graph.call_method("transpose", (k, -2, -1))))
    if mask is not None and mask.target is torch.logical_not:
        blocked = mask.args[0]
        scores = graph.call_method("masked_fill", (scores, blocked, float("-inf")))
    elif mask is not None:
        scores = graph.call_function(operator.add, (scores, mask))
    weights = graph.call_function(torch.softmax, (scores,), {"dim": -1})
    if m.dropout > 0:
        drop = nn.Dropout(m.dropout)
        drop.training = m.training
        m.add_module("attention_dropout", drop)
        weights = graph.call_module(f"{path}.attention_dropout", (weights,))
    return graph.call_function(torch.matmul, (weights, v)), weights
