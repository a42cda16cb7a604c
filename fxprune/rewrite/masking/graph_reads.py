"""Multiply every read of a masked parameter in a graph by its mask.

``conv2d(x, weight)`` becomes ``conv2d(x, mul(weight, weight_mask))``. Where the graph standardises the weight
first, the kernel's operand is masked a second time, for standardisation moves zeros.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node, map_arg
from torch.fx.graph import Graph

from fxprune.capture.tracer.spelling import changes_input
from fxprune.rewrite.masking.operand_probe import FAILURES, UnfollowableError, moves_zeros
from fxprune.rewrite.masking.sharded import plain_class
from fxprune.rewrite.masking.storage import SUFFIX
from fxprune.rewrite.masking.weight_functions import KERNELS, weight_operand, with_weight_operand
from fxprune.sharded_types import is_dtensor

# The second is what capturing a masked plain module gives.
_PRODUCTS = (torch.mul, operator.mul)


def mask_reads(gm: GraphModule) -> None:
    """Insert the multiplications that are missing, in place."""
    reads = [
        node for node in gm.graph.nodes if node.op == "get_attr" and mask_of(gm, node.target) is not None
    ]
    changed = False
    for node in reads:
        readers = {user for user in node.users if not only_writes(user, node)}
        if any(not is_mask_product(gm, user) for user in readers):
            product = _mask_after(gm, node, node.target)
            node.replace_all_uses_with(product, delete_user_cb=readers.__contains__)
            changed = True
    for node in list(gm.graph.nodes):
        changed |= _mask_operand(gm, node)
    if changed:
        gm.graph.lint()
        _recompile(gm)


def only_writes(node: Node, operand: Node) -> bool:
    """Whether a node, or what is made of its result, writes into ``operand`` and gives nobody its value.

    The product with the mask is another tensor: what is written there would be lost.
    """
    open_, seen = [(node, operand)], {node}
    while open_:
        reader, value = open_.pop()
        if changes_input(reader):
            place = reader.kwargs.get("out") or (reader.args[0] if reader.args else None)
            if place is not value or reader.users:
                return False
        elif not reader.users:
            return False
        else:
            new = [user for user in reader.users if user not in seen]
            seen.update(new)
            open_ += [(user, reader) for user in new]
    return True


def _recompile(gm: GraphModule) -> None:
    # Code written into a class that fully_shard has put on top of the graph's own would call itself for ever.
    own = type(gm)
    gm.__class__ = plain_class(own)  # type: ignore[assignment]
    gm.recompile()
    gm.__class__ = own


def direct_reads(gm: GraphModule) -> list[str]:
    """List the parameters that a captured graph reads without calling their owner.

    It is what :func:`fxprune.rewrite.install` must be told (``direct``) when masks go into the plain module
    that the graph was captured from.

    >>> direct_reads(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 1))))
    []
    """
    found = {str(node.target): None for node in gm.graph.nodes if node.op == "get_attr"}
    return [name for name in found if isinstance(attribute_at(gm, name), nn.Parameter)]


def attribute_at(gm: nn.Module, target: str) -> Any:
    """Return what a ``get_attr`` node reads."""
    path, _, attribute = target.rpartition(".")
    return getattr(gm.get_submodule(path), attribute)


def mask_of(gm: GraphModule, target: str) -> torch.Tensor | None:
    """The mask beside the parameter that ``target`` names, if there is one."""
    path, _, attribute = target.rpartition(".")
    module = gm.get_submodule(path)
    return module._buffers.get(attribute + SUFFIX) if attribute in module._parameters else None


def is_mask_product(gm: GraphModule, node: Node) -> bool:
    """Whether this node multiplies something with a mask, as :func:`mask_reads` puts it in."""
    if node.op != "call_function" or node.target not in _PRODUCTS or len(node.args) != 2:
        return False
    mask = node.args[1]
    if not (isinstance(mask, Node) and mask.op == "get_attr"):
        return False
    target = str(mask.target)
    return target.endswith(SUFFIX) and mask_of(gm, target[: -len(SUFFIX)]) is not None


def _mask_after(gm: GraphModule, value: Node, parameter: str) -> Node:
    """Insert ``mul(value, mask of parameter)`` right after ``value``."""
    with gm.graph.inserting_after(value):
        mask = gm.graph.get_attr(parameter + SUFFIX)
    with gm.graph.inserting_after(mask):
        product = gm.graph.call_function(torch.mul, (value, mask))
    product.meta = copy.copy(value.meta)
    mask.meta = {key: kept for key, kept in value.meta.items() if key == "nn_module_stack"}
    if isinstance(value.meta.get("val"), torch.Tensor):
        mask.meta["val"] = torch.empty_like(value.meta["val"], dtype=torch.bool, requires_grad=False)
    return product


def check_reads(gm: GraphModule, parameters: Collection[int]) -> None:
    """Raise ``ValueError`` if masks on these parameters (by ``id``) could not be placed in the graph."""
    for node in gm.graph.nodes:
        _moved_parameter(gm, node, lambda target: id(attribute_at(gm, target)) in parameters)


def _mask_operand(gm: GraphModule, kernel: Node) -> bool:
    """Mask the weight operand of a kernel, if more than movement made it from a masked parameter."""
    name = _moved_parameter(gm, kernel, lambda target: mask_of(gm, target) is not None)
    if name is None:
        return False
    product = _mask_after(gm, weight_operand(kernel.args, kernel.kwargs), name)
    kernel.args, kernel.kwargs = with_weight_operand(kernel.args, kernel.kwargs, product)
    return True


def _moved_parameter(gm: GraphModule, kernel: Node, concerned: Callable[[str], bool]) -> str | None:
    """Find the parameter that a kernel uses re-centred (standardised) and not masked after that, if any."""
    operand = weight_operand(kernel.args, kernel.kwargs) if kernel.target in KERNELS else None
    if not isinstance(operand, Node) or is_mask_product(gm, operand):
        return None
    region = constant_region(operand) or []
    for node in region:
        if node.op != "get_attr" or not concerned(str(node.target)):
            continue

        def compute(weight: torch.Tensor, source: Node = node) -> torch.Tensor | None:
            value = evaluate(gm, region, {source: weight})
            return value if isinstance(value, torch.Tensor) and value.shape == weight.shape else None

        try:
            if moves_zeros(compute, attribute_at(gm, str(node.target)).shape):
                return str(node.target)
        except UnfollowableError as error:
            raise ValueError(f"masks[{node.target!r}]: {error}") from error
        except FAILURES:
            continue  # verify computes the operand as the model does, and finds what is left
    return None


def constant_region(node: Node) -> list[Node] | None:
    """List the nodes that ``node`` is computed from, itself last; None if it depends on the input."""
    found: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        if current.op in ("placeholder", "output"):
            return None
        found[current] = None
        stack += current.all_input_nodes
    wanted = set(found)
    return [candidate for candidate in node.graph.nodes if candidate in wanted]


def evaluate(gm: GraphModule, region: list[Node], given: dict[Node, torch.Tensor] | None = None) -> Any:
    """Compute the value of the last node of a :func:`constant_region`.

    With ``given``, in float64 on the CPU, those nodes having those values, and masks being left out; values
    of parameters that are split over processes are made up. Else as the model would compute it.
    """
    values: dict[Node, Any] = dict(given or {})
    for node in region:
        if node in values:
            continue
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            value = attribute_at(gm, str(node.target))
            if given is not None and is_dtensor(value):
                value = torch.ones(value.shape)
            double = given is not None and isinstance(value, torch.Tensor) and value.is_floating_point()
            values[node] = value.detach().to("cpu", torch.float64) if double else value
        elif node.op == "call_function":
            masked = given is not None and is_mask_product(gm, node)
            values[node] = args[0] if masked else node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            module = gm.get_submodule(str(node.target))
            values[node] = (copy.deepcopy(module).to("cpu").double().eval() if given is not None else module)(
                *args, **kwargs
            )
    return values[region[-1]]


def unmask_reads(gm: GraphModule) -> None:
    """Remove the multiplications of :func:`mask_reads`, in place; the masks must still be there."""
    graph: Graph = gm.graph
    for node in list(graph.nodes):
        if is_mask_product(gm, node):
            value, mask = node.args
            node.replace_all_uses_with(value)
            graph.erase_node(node)
            if not mask.users:
                graph.erase_node(mask)
    graph.lint()
    gm.recompile()
