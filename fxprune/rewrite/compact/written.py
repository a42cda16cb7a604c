"""Find the parameters that a network writes into when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from fxprune.capture.tracer.spelling import changes_input

__all__ = ["written_parameters"]


def written_parameters(gm: fx.GraphModule) -> set[str]:
    """Return the names of parameters and buffers that nodes of a graph change in place.

    Such are tables with ``max_norm``, whose vectors are shortened as they are read, and weights that code
    multiplies by a mask of its own (``weight.data *= mask``).

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Embedding(4, 2, max_norm=1.0), torch.nn.Linear(2, 1))
        >>> written_parameters(fxprune.capture(net, torch.tensor([0])))
        {'0.weight'}
    """
    return {name for node in gm.graph.nodes for name in _written(gm, node)}


def _written(gm: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            yield f"{node.target}.weight"
        return
    target: Any = None
    if node.target in (F.embedding, F.embedding_bag) and node.kwargs.get("max_norm") is not None:
        target = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    elif changes_input(node) and node.args:
        target = node.args[0]
    while isinstance(target, fx.Node) and target.op in ("call_function", "call_method") and target.args:
        target = target.args[0]  # a view of it
    if isinstance(target, fx.Node) and target.op == "get_attr":
        yield str(target.target)
