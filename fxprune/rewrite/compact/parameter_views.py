"""Find the entries left of what a network computes from parameters alone, once these have lost some.

Entries that go are marked by a number that is none: all that is computed from them is none either, and data
movement carries it along. Where a result has it at some indices of an axis and not at others, those go.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.rewrite.compact.kept import Kept, Slices
from fxprune.rewrite.compact.trial import RUN_ERRORS

__all__ = ["KeptByNode", "constant_nodes", "kept_of_parameters", "parameters_of_constant"]

KeptByNode = dict[fx.Node, list[Tensor | None]]
"""By node and axis, the entries that stay (bool), None for all."""


def kept_of_parameters(gm: fx.GraphModule, slices: Slices) -> KeptByNode:
    """Return what is left of the nodes that are computed from parameters which get smaller alone.

    ``gm`` holds the parameters as they were. Nodes that mix what goes with what stays are left out.
    """
    constant = constant_nodes(gm)
    roots = dict.fromkeys(str(node.target) for node in constant if node.op == "get_attr")
    found: KeptByNode = {}
    mixed: set[fx.Node] = set()
    for root in roots:
        kept = slices.get(root)
        for axis, index in enumerate(kept.axes if kept is not None else ()):
            if kept is None or index is None:
                continue
            for node, marked in _results(gm, constant, root, _marked(gm, root, kept, axis)).items():
                place, stays = _axis_left(marked)
                if stays is None:
                    mixed.add(node)
                else:
                    found.setdefault(node, [None] * marked.dim())[place] = stays
    return {node: axes for node, axes in found.items() if node not in mixed}


def constant_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the parameters that are read, and the functions of these alone, in order."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        call = node.op in ("call_function", "call_method") and bool(sources)
        if node.op == "get_attr" or (call and all(source in found for source in sources)):
            found[node] = None
    return list(found)


def parameters_of_constant(gm: fx.GraphModule, name: str) -> set[str]:
    """Return the parameters that a node is computed from, with numbers of code, and from no input."""
    found = {node for node in gm.graph.nodes if node.name == name and node.op.startswith("call")}
    for node in reversed(gm.graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    if not all(node.op in ("get_attr", "call_function", "call_method") for node in found):
        return set()
    return {str(node.target) for node in found if node.op == "get_attr"}


def _marked(gm: fx.GraphModule, name: str, kept: Kept, axis: int) -> Tensor:
    """The parameter with no numbers in the entries that go along one axis."""
    index = kept.axes[axis]
    assert index is not None
    tensor: Any = fx.Interpreter(gm).fetch_attr(name)
    gone = torch.ones(kept.shape[axis], dtype=torch.bool, device=tensor.device)
    gone[index.to(tensor.device)] = False
    marked: Tensor = _numbers(tensor).movedim(axis, 0)
    marked[gone] = float("nan")
    return marked.movedim(0, axis)


def _numbers(tensor: Tensor) -> Tensor:
    """A copy in which a number that is none, of the network itself, is no mark."""
    own = tensor.detach().clone()
    return own.nan_to_num_(0.0) if own.is_floating_point() else own


def _results(
    gm: fx.GraphModule, constant: Collection[fx.Node], root: str, marked: Tensor
) -> dict[fx.Node, Tensor]:
    """Compute what depends on a parameter, on copies of what it reads; what fails is left out."""
    runner, known, found = fx.Interpreter(gm), dict[fx.Node, Any](), dict[fx.Node, Tensor]()
    wanted = _around(constant, root)
    for node in constant:
        if node not in wanted or any(source not in known for source in node.all_input_nodes):
            continue
        try:
            if node.op == "get_attr":
                value = marked if node.target == root else runner.fetch_attr(str(node.target))
                if node.target != root and isinstance(value, Tensor):
                    value = _numbers(value)
                known[node] = value
            else:
                args, kwargs = (fx.node.map_arg(x, known.__getitem__) for x in (node.args, node.kwargs))
                with torch.no_grad():
                    known[node] = getattr(runner, node.op)(node.target, args, kwargs)
        except RUN_ERRORS:
            continue
        result = known[node]
        if isinstance(result, Tensor) and result.is_floating_point() and bool(result.isnan().any()):
            found[node] = result.clone()
    return found


def _around(constant: Collection[fx.Node], root: str) -> set[fx.Node]:
    """The nodes that depend on a parameter, and all that these are computed from."""
    found: set[fx.Node] = set()
    for node in constant:
        if (node.op == "get_attr" and node.target == root) or any(x in found for x in node.all_input_nodes):
            found.add(node)
    waiting = list(found)
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return found


def _axis_left(marked: Tensor) -> tuple[int, Tensor | None]:
    """The axis along which some indices are without marks and some are not, and those that are without."""
    none = marked.isnan()
    for axis in range(none.dim()):
        gone = none.movedim(axis, 0).unsqueeze(-1).flatten(1).any(1)
        if bool(gone.any()) and not bool(gone.all()):
            return axis, ~gone.cpu()
    return 0, None
