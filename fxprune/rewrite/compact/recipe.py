"""Write down what one compaction did to a captured network, as plain data that a file can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from fxprune.rewrite.compact.kept import Kept
from fxprune.rewrite.compact.norms import NarrowedGroupNorm, NarrowedLayerNorm, NarrowedRMSNorm
from fxprune.rewrite.compact.plain_values import FUNCTIONS, Unwritable, encode, encode_tree
from fxprune.rewrite.files.runs import runs

__all__ = ["NORMS", "Recipe", "node_digests", "record_recipe", "sizes_of"]

NORMS: dict[str, type[NarrowedLayerNorm] | type[NarrowedRMSNorm] | type[NarrowedGroupNorm]] = {
    "group": NarrowedGroupNorm,
    "layer": NarrowedLayerNorm,
    "rms": NarrowedRMSNorm,
}
DIGEST = 8
"""Hexadecimal digits by node."""


@dataclass(frozen=True)
class Recipe:
    """Hold how a captured network became a smaller one; all of it is JSON.

    Attributes:
        inputs: by placeholder, shapes and types of the inputs of the capture.
        masked: names of the parameters that had masks.
        nodes: the digests of the captured graph's nodes, one after the other.
        parameters: by name, the shapes of the network's parameters before it was captured, tied ones once.
        kept: by tensor, the indices that stay: for each axis ("0-3,7", None = all), or flat with a shape.
        added: by name, the shapes of parameters that are new.
        sizes: by module, the attributes that changed.
        norms: by path, the norms that are new.
        edits: the nodes that changed or are new, in order.
        erased: the nodes that are gone.
        opened: the paths of layers that were opened first, in order.
        removed: modules, parameters and buffers that are gone.
        unwritable: the reason why this recipe cannot be followed; empty if it can.
    """

    inputs: dict[str, Any]
    masked: list[str]
    nodes: str
    parameters: dict[str, list[int]]
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    added: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, dict[str, Any]] = field(default_factory=dict)
    edits: list[dict[str, Any]] = field(default_factory=list)
    erased: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unwritable: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


def record_recipe(
    captured: fx.GraphModule,
    gm: fx.GraphModule,
    small: fx.GraphModule,
    slices: Mapping[str, Kept],
    *,
    opened: list[str],
    masked: list[str],
    parameters: dict[str, list[int]],
) -> Recipe:
    """Compare a captured network with the smaller one that was made of a copy of it.

    Args:
        captured: the network before.
        gm: the same with the layers at the paths ``opened`` written out, in this order.
        small: the network after; nodes and modules that stayed have the names that they had.
        slices: by tensor that got smaller, what stayed of it.
        masked: the names of parameters that had masks before they were finalized.
        parameters: the shapes of all parameters before that.
    """
    before = dict(gm.named_parameters()) | dict(gm.named_buffers())
    recipe = Recipe(
        inputs={},
        masked=masked,
        nodes="".join(node_digests(captured)),
        parameters=parameters,
        opened=opened,
    )
    try:
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                recipe.inputs[str(node.target).lstrip("*")] = encode_tree(node.meta["val"])
        for name, kept in slices.items():
            if name in before:
                recipe.kept[name] = _coded(kept)
        recipe.norms.update(_norms(gm, small))
        for name, parameter in small.named_parameters():
            if name not in before:
                recipe.added[name] = list(parameter.shape)
        recipe.sizes.update(_changed_sizes(gm, small))
        recipe.edits.extend(_edits(gm, small))
        left = {node.name for node in small.graph.nodes}
        recipe.erased.extend(node.name for node in gm.graph.nodes if node.name not in left)
        recipe.removed.extend(_removed(gm, small))
    except Unwritable as error:
        return Recipe(recipe.inputs, masked, recipe.nodes, recipe.parameters, unwritable=str(error))
    return recipe


def node_digests(gm: fx.GraphModule) -> list[str]:
    """Digest every node: name, target, arguments, and the settings of a module of torch."""
    digests = []
    for node in gm.graph.nodes:
        target = node.target if isinstance(node.target, str) else _name(node.target)
        words: list[Any] = [node.name, node.op, target]
        words += [encode(node.args, strict=False), encode(node.kwargs, strict=False)]
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            words.append(_name(type(module)))
            words.append(module.extra_repr() if type(module).__module__.startswith("torch.nn.") else "")
        text = json.dumps(words).encode()
        digests.append(hashlib.blake2s(text, digest_size=DIGEST // 2).hexdigest())
    return digests


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, or lists of numbers."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (int, float))


def _name(target: Any) -> str:
    name = getattr(target, "__qualname__", getattr(target, "__name__", type(target).__qualname__))
    return f"{getattr(target, '__module__', None)}.{name}"


def _coded(kept: Kept) -> dict[str, Any]:
    """Code the entries that stay of a tensor, by axis where they are a product of indices."""
    if kept.flat is None:
        return {"axes": [None if index is None else runs(index.tolist()) for index in kept.axes]}
    return {"flat": runs(kept.flat.flatten().tolist()), "shape": list(kept.flat.shape)}


def _changed_sizes(gm: fx.GraphModule, small: fx.GraphModule) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    old = dict(gm.named_modules())
    for path, module in small.named_modules():
        if path in old and old[path] is not gm:
            if not _is_alike(module, old[path]):
                raise Unwritable(f"{path}: it became a {type(module).__name__}")
            before = sizes_of(old[path])
            changed = {
                name: encode(value)
                for name, value in sizes_of(module).items()
                if name not in before or before[name] != value
            }
            if changed:
                found[path] = changed
    return found


def _is_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules run the same code; every graph has a class of its own."""
    if isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule):
        return one.code == other.code
    return type(one) is type(other)


def _norms(gm: fx.GraphModule, small: fx.GraphModule) -> dict[str, dict[str, Any]]:
    found = {}
    old = dict(gm.named_modules())
    for path, module in small.named_modules():
        if path in old:
            continue
        kind = next((kind for kind, cls in NORMS.items() if type(module) is cls), None)
        if kind is None:
            raise Unwritable(f"{path}: a new {type(module).__name__}")
        norm: Any = module
        shapes = {name: list(buffer.shape) for name, buffer in module.named_buffers()}
        found[path] = {"kind": kind, "width": norm.width, "eps": norm.eps, "shapes": shapes}
    return found


def _removed(gm: fx.GraphModule, small: fx.GraphModule) -> list[str]:
    """The modules that are gone with all in them, and the tensors that are gone from modules that stayed."""
    found: list[str] = []
    stayed = {name for name, _ in small.named_modules(remove_duplicate=False)}
    tensors = {*_tensors(small)}
    for name in [*(name for name, _ in gm.named_modules(remove_duplicate=False)), *_tensors(gm)]:
        inside = any(name.startswith(f"{one}.") for one in found)
        if name not in stayed and name not in tensors and not inside:
            found.append(name)
    return found


def _tensors(module: nn.Module) -> list[str]:
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return [name for some in named for name, _ in some]


def _edits(gm: fx.GraphModule, small: fx.GraphModule) -> list[dict[str, Any]]:
    """The nodes of the smaller graph that the captured one has not, or has otherwise."""
    old = {node.name: node for node in gm.graph.nodes}
    found: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for node in small.graph.nodes:
        edit: dict[str, Any] = {"node": node.name}
        edit |= {"args": encode(node.args), "kwargs": encode(dict(node.kwargs))}
        before = old.get(node.name)
        if before is None:
            edit |= {"op": node.op, "target": _target(node)}
            waiting.append(edit)
            found.append(edit)
            continue
        for new in waiting:
            new["before"] = node.name
        waiting.clear()
        if before.op != node.op:
            raise Unwritable(f"{node.name}: {before.op} became {node.op}")
        if before.target != node.target:
            edit["target"] = _target(node)
        same = (encode(before.args, strict=False), encode(dict(before.kwargs), strict=False))
        if "target" in edit or same != (edit["args"], edit["kwargs"]):
            found.append(edit)
    return found


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = next((name for name, function in FUNCTIONS.items() if function is node.target), None)
    if name is None:
        raise Unwritable(f"{node.name}: a call of {_name(node.target)}")
    return name
