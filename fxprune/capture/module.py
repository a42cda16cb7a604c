"""The GraphModule that capture returns: it copies and pickles with its graph, its shapes and all of its
parts.

``torch.fx.GraphModule`` re-traces its own code when it is unpickled, which runs factory functions and loses
``meta["val"]``, and keeps only what its nodes refer to when it is copied. This subclass writes its nodes
down instead.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils.rnn import PackedSequence, PackedSequence_

from fxprune.capture.attributes import Attributes, attributes_of
from fxprune.capture.errors import CaptureError
from fxprune.capture.hooks import (
    BACKWARD_TABLES,
    FORWARD_TABLES,
    KINDS,
    Hook,
    traced_hooks,
    without_hooks,
)
from fxprune.capture.recompute import keep_regions
from fxprune.capture.runner import NodeRunner
from fxprune.torch_private import OpOverload, OpOverloadPacket, qualified_name

__all__ = [
    "CapturedModule",
    "LeafGraph",
    "OpenGraph",
    "assemble",
    "assemble_leaf",
    "leaf_attributes",
    "reserved_names",
]

# What a module does around its forward, and with its state dict: the graph does the same.
HOOK_TABLES = (
    *FORWARD_TABLES,
    *BACKWARD_TABLES,
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class CapturedModule(fx.GraphModule):
    """A captured model: an ``fx.GraphModule`` with the model's own submodules, parameters and keys.

    Copying and pickling keep the graph, ``node.meta["val"]``, tied weights, hooks and non-persistent buffers.
    ``leaf_attributes`` are the attributes, at the time of the capture, of each leaf and of the modules in it.
    ``left_behind`` are the public names that the model's class has and a graph has not. ``in_shell``: it
    calls its model as a whole, see :class:`.Shell`.
    """

    leaf_attributes: dict[str, dict[str, Attributes]]
    left_behind: frozenset[str]
    in_shell: bool = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in vars(self).get("left_behind", ()):
                raise
            raise AttributeError(
                f"{error}: a graph has the parameters and the forward of its model, not its methods; prune"
                " with returns='module' to keep them"
            ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        result = CapturedModule.__new__(CapturedModule)
        memo[id(self)] = result
        state = {key: value for key, value in vars(self).items() if key != "_graph"}
        return _fill(result, type(self).__name__, copy.deepcopy(state, memo), copy.deepcopy(self.graph))

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in vars(self).items() if key != "_graph"}
        return _restore, (type(self).__name__, _written(self.graph)), state, None, None, _set_state


class LeafGraph(nn.Module):
    """The inside of one leaf: its parts, and a ``graph`` that calls them.

    It is made to be looked at, and often: no code is written for its graph, which runs node by node.
    """

    def __init__(self, parts: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        if hasattr(parts, "graph"):
            raise CaptureError("a part of it is called 'graph', as its own graph is")
        vars(self).update(vars(parts))
        self.graph = graph

    def forward(self, *args: Any) -> Any:
        """Run the graph on positional arguments."""
        return NodeRunner(self).run(*args)


OpenGraph: TypeAlias = fx.GraphModule | LeafGraph
"""A graph and the parts that it calls."""


@functools.cache
def reserved_names() -> frozenset[str]:
    """Names that a part of a captured model cannot have: attributes of graph modules that modules lack."""
    empty = CapturedModule(nn.Module(), fx.Graph())
    return frozenset({*dir(empty), "leaf_attributes", "left_behind"}) - frozenset(dir(nn.Module()))


def assemble(
    model: nn.Module, graph: fx.Graph, extra: dict[str, Any], kept: Collection[Hook] = ()
) -> CapturedModule:
    """A GraphModule that runs ``graph`` on the very submodules, parameters and buffers of ``model``.

    ``extra`` holds what the graph needs besides: modules, and constants, which become non-persistent buffers.
    Hooks that were traced are in the graph, and not in the modules that it calls; ``kept`` are those that
    were not. A module that loses hooks is a copy that shares its parameters.
    """
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    model = _without_traced_hooks(model, targets, kept)
    root = _parts(model, extra)
    keep_regions(graph)
    result = CapturedModule(root, graph, type(model).__name__)
    vars(result).update(vars(root))
    for table in HOOK_TABLES:  # a hook that is given its module gets this one: the other may go
        hooks = vars(result)[table]
        hooks.update({key: type(hook)(hook.hook, result) for key, hook in hooks.items() if _is_bound(hook)})
    if any(getattr(model, table) for table in (*KINDS, *BACKWARD_TABLES)):
        # Its hooks may read any attribute of the model.
        others = {key: value for key, value in vars(model).items() if key not in ("forward", "_graph")}
        vars(result).update({key: value for key, value in others.items() if key not in vars(result)})
    vars(result)["leaf_attributes"] = {path: attributes_of(result.get_submodule(path)) for path in targets}
    vars(result)["left_behind"] = _names_left_behind(model)
    recipes = model.meta.get("fxprune", {}).get("recipes") if isinstance(model, CapturedModule) else None
    if recipes:  # how it became smaller than its original
        result.meta["fxprune"] = {"recipes": recipes}
    graph.lint()
    return result


def assemble_leaf(module: nn.Module, graph: fx.Graph, extra: dict[str, Any]) -> LeafGraph:
    """Put the inside of a leaf together, on the very submodules, parameters and buffers of ``module``.

    ``extra`` and hooks as in :func:`assemble`.
    """
    targets = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return LeafGraph(_parts(_without_traced_hooks(module, targets, ()), extra), graph)


def _parts(model: nn.Module, extra: dict[str, Any]) -> nn.Module:
    """Gather the submodules, parameters, buffers and hooks of ``model``, and ``extra``, in a plain module."""
    root = nn.Module()
    for table in ("_parameters", "_buffers", "_modules", *HOOK_TABLES):
        vars(root)[table] = copy.copy(vars(model)[table])
    vars(root)["_non_persistent_buffers_set"] = set(model._non_persistent_buffers_set)
    for name, value in extra.items():
        if isinstance(value, nn.Module):
            root.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            # One that the model never registered: it is used, but is no part of the state.
            object.__setattr__(root, name, value)
        else:
            root.register_buffer(name, value, persistent=False)
    vars(root).update({key: value for key, value in vars(model).items() if isinstance(value, Tensor)})
    root.training = model.training
    return root


def _names_left_behind(model: nn.Module) -> frozenset[str]:
    if isinstance(model, CapturedModule):
        return model.left_behind
    return frozenset(
        name for name in dir(type(model)) if not name.startswith("_") and not hasattr(fx.GraphModule, name)
    )


def _is_bound(hook: Any) -> bool:
    """Whether a registered hook refers to the module that it was registered on."""
    return bool(getattr(hook, "with_module", False))


def _without_traced_hooks(model: nn.Module, targets: set[str], kept: Collection[Hook]) -> nn.Module:
    """Copy the modules whose hooks are in the graph, and those around them; the rest is shared.

    A module inside of one that the graph calls runs as it did, with its hooks.
    """
    kept, made = set(kept), {}
    dropped = {
        path: {hook for hook, _ in traced_hooks(module)} - kept
        for path, module in model.named_modules(remove_duplicate=False)
    }
    for path in [path for path, hooks in dropped.items() if hooks]:
        atoms = path.split(".")
        around = [".".join(atoms[:i]) for i in range(1, len(atoms))] if path else []
        outer = next((name for name in around if name in targets), None)
        if outer is None:
            for name in (path, *around, ""):
                module = model.get_submodule(name)
                made[id(module)] = without_hooks(module, dropped[name])
        elif path in targets:
            raise CaptureError(f"{outer} stays whole, but {path} in it has hooks and is called elsewhere")
    for module in made.values():
        modules = {name: made[id(inner)] for name, inner in module._modules.items() if id(inner) in made}
        if modules:
            vars(module)["_modules"] = {**module._modules, **modules}
    return made.get(id(model), model)


def leaf_attributes(gm: OpenGraph, node: fx.Node) -> dict[str, Attributes]:
    """Find the attributes that the leaf of ``node`` had at the capture; none if ``gm`` was not captured."""
    return gm.leaf_attributes.get(str(node.target), {}) if isinstance(gm, CapturedModule) else {}


def _fill(result: CapturedModule, name: str, state: dict[str, Any], graph: fx.Graph) -> CapturedModule:
    vars(result).update(state)
    type(result).__name__ = name
    keep_regions(graph)
    result.graph = graph
    return result


# -- pickling
# -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _NodeIndex:
    index: int


@dataclass(frozen=True)
class _Name:
    """A function by the place where it can be imported from."""

    module: str
    path: str


def _written(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes as plain tuples, references as indices."""
    index = {node: _NodeIndex(i) for i, node in enumerate(graph.nodes)}

    def refer(args: Any) -> Any:
        replace: Any = index.__getitem__
        return map_arg(args, replace)

    return [
        (
            n.op,
            _name(n.target),
            refer(n.args),
            refer(n.kwargs),
            n.name,
            {key: _unchecked(n.meta[key]) for key in ("val", "checkpoint") if key in n.meta},
        )
        for n in graph.nodes
    ]


def _unchecked(value: Any) -> Any:
    """Shapes of packed sequences as plain named tuples: their own class asks for a device when it is made."""
    if isinstance(value, PackedSequence):
        plain: Any = PackedSequence_
        return plain._make(value)
    return tuple(map(_unchecked, value)) if type(value) is tuple else value


def _name(target: Any) -> Any:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverloadPacket | OpOverload):
        return _Name("torch", f"ops.{target}")
    places = [(getattr(target, "__module__", None), getattr(target, "__qualname__", ""))]
    if getattr(target, "__name__", None):
        places.append(qualified_name(target).rpartition(".")[::2])
    for module, path in places:
        if module and path and _find(_Name(module, path)) is target:
            return _Name(module, path)
    return target


def _find(name: _Name) -> Any:
    try:
        found: Any = importlib.import_module(name.module)
        if name.module == "torch" and name.path.startswith("ops.") and "aten" not in name.path:
            with suppress(ImportError):  # a library registers its operators when it is imported
                importlib.import_module(name.path.split(".")[1])
        for atom in name.path.split("."):
            found = getattr(found, atom)
    except (ImportError, AttributeError):
        return None
    return found


def _restore(name: str, written: list[tuple[Any, ...]]) -> CapturedModule:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, target, args, kwargs, label, meta in written:
        function: str | Callable[..., Any] = _find(target) if isinstance(target, _Name) else target
        node = graph.create_node(op, function, _resolved(args, nodes), _resolved(kwargs, nodes), label)
        node.meta.update(meta)
        nodes.append(node)
    result = CapturedModule.__new__(CapturedModule)
    type(result).__name__ = name
    vars(result)["_graph"] = graph
    return result


def _set_state(result: CapturedModule, state: dict[str, Any]) -> None:
    _fill(result, type(result).__name__, state, vars(result)["_graph"])


def _resolved(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, _NodeIndex):
        return nodes[value.index]
    if isinstance(value, tuple | list):
        return type(value)([_resolved(item, nodes) for item in value])
    if isinstance(value, dict):
        return {key: _resolved(item, nodes) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_resolved(item, nodes) for item in (value.start, value.stop, value.step)))
    return value
