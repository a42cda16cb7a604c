"""Follow a recipe: a captured network comes to have the shape of the smaller one that the recipe is of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from fxprune.rewrite.compact.kept import Kept
from fxprune.rewrite.compact.leaves import StaysWhole, open_leaf
from fxprune.rewrite.compact.modules import share_parameters, slice_parameters
from fxprune.rewrite.compact.plain_values import FUNCTIONS, METHODS, decode
from fxprune.rewrite.compact.recipe import DIGEST, NORMS, Recipe, node_digests
from fxprune.rewrite.compact.trial import set_shapes, two_runs
from fxprune.rewrite.files.runs import indices

__all__ = ["first_difference", "replay"]


def first_difference(gm: fx.GraphModule, recipe: Recipe) -> str | None:
    """Name the first node of ``gm`` that is not as the recipe has it; None if the graphs are equal."""
    wanted = [recipe.nodes[at : at + DIGEST] for at in range(0, len(recipe.nodes), DIGEST)]
    found = node_digests(gm)
    for node, digest, expected in zip(gm.graph.nodes, found, wanted, strict=False):
        if digest != expected:
            return str(node.name)
    return None if len(found) == len(wanted) else f"number {min(len(found), len(wanted)) + 1}"


def replay(gm: fx.GraphModule, recipe: Recipe, example_inputs: Any = None) -> fx.GraphModule:
    """Return a copy of a captured network with the smaller graph; the values of its tensors mean nothing.

    ``example_inputs``: as in :func:`fxprune.compact`.

    Raises:
        KeyError, ValueError, AttributeError, RuntimeError: the recipe does not fit.
    """
    small = copy.deepcopy(gm).eval()
    inputs, _ = two_runs(small, example_inputs)
    for path in recipe.opened:
        small = share_parameters(small)  # as in compact: a copy numbers the names of new nodes anew
        try:
            open_leaf(small, path)
        except StaysWhole as error:
            raise ValueError(f"{path} cannot be written out: {error}") from error
        set_shapes(small, inputs)
    for path, norm in recipe.norms.items():
        small.add_module(path, _norm(norm))
    for path, sizes in recipe.sizes.items():
        module = small.get_submodule(path)
        for name, value in sizes.items():
            if name not in vars(module):
                raise ValueError(f"{path} has no attribute {name!r}")
            setattr(module, name, decode(value))
    tensors = dict(small.named_parameters()) | dict(small.named_buffers())
    slices = {name: _kept(tuple(tensors[name].shape), coded) for name, coded in recipe.kept.items()}
    slice_parameters(small, slices, {}, {})
    for name, shape in recipe.added.items():
        path, _, leaf = name.rpartition(".")
        owner = small.get_submodule(path)
        like = next(iter((*owner.parameters(recurse=False), *small.parameters())), torch.empty(0))
        setattr(owner, leaf, nn.Parameter(like.new_zeros(shape), like.requires_grad))
    _edit(small, recipe)
    for name in recipe.removed:
        path, _, leaf = name.rpartition(".")
        delattr(small.get_submodule(path), leaf)
    set_shapes(small, inputs)
    before = gm.meta.get("fxprune", {}).get("recipes", ())
    small.meta["fxprune"] = {"recipes": [*before, recipe]}
    return small


def _norm(given: dict[str, Any]) -> nn.Module:
    zeros = {name: torch.zeros(shape) for name, shape in given["shapes"].items()}
    return NORMS[given["kind"]](given["width"], given["eps"], **zeros)


def _kept(shape: tuple[int, ...], coded: dict[str, Any]) -> Kept:
    """The entries that stay of a tensor, as a recipe codes them."""
    if "flat" in coded:
        places = torch.tensor(indices(coded["flat"]), dtype=torch.int64).view(coded["shape"])
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < torch.Size(shape).numel():
            raise ValueError("an index beyond the end")
        return Kept(shape, flat=places)
    axes = tuple(
        None if code is None else torch.tensor(indices(code), dtype=torch.int64) for code in coded["axes"]
    )
    if len(axes) != len(shape):
        raise ValueError("indices of other axes")
    if any(
        index is not None and not bool((index < size).all()) for index, size in zip(axes, shape, strict=True)
    ):
        raise ValueError("an index beyond the end")
    return Kept(shape, axes)


def _edit(gm: fx.GraphModule, recipe: Recipe) -> None:
    nodes = {node.name: node for node in gm.graph.nodes}
    for edit in recipe.edits:
        if "op" in edit:
            with gm.graph.inserting_before(nodes[edit["before"]]):
                target = _allowed(edit["op"], edit["target"])
                args, kwargs = decode(edit["args"], nodes), decode(edit["kwargs"], nodes)
                new = gm.graph.create_node(edit["op"], target, args, kwargs, name=edit["node"])
            if new.name != edit["node"]:
                raise ValueError(f"there are two nodes {edit['node']!r}")
            nodes[new.name] = new
    for edit in recipe.edits:
        node = nodes[edit["node"]]
        if "op" not in edit:
            node.args, node.kwargs = decode(edit["args"], nodes), decode(edit["kwargs"], nodes)
            if "target" in edit:
                node.target = _allowed(node.op, edit["target"])
    for name in reversed(recipe.erased):
        gm.graph.erase_node(nodes[name])
    gm.graph.lint()
    gm.recompile()


def _allowed(op: str, target: str) -> Any:
    """Look up what a node of a file may call: two short lists, and the functions of the network's own."""
    if op == "call_function":
        return FUNCTIONS[target]
    if op == "call_method" and target not in METHODS:
        raise ValueError(f"a call of the method {target!r}")
    if op not in ("call_method", "call_module", "get_attr"):
        raise ValueError(f"a node of kind {op!r}")
    return target
