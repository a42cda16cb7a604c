"""Remove branches that give the same numbers for every input: layers without a weight, and what reads them.

A layer whose weights are all gone gives its bias, whatever it is given. What is computed from that alone, and
from parameters, is a constant. Where a live value meets the constant in a sum or product, it takes the place
of the branch; in a sum it goes into a bias of the live side, if there is one. All that only the branch read
is gone with it: whole attentions, gates and shortcuts.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.capture.hooks import keeps_hooks
from fxprune.capture.tracer.spelling import changes_input
from fxprune.rewrite.compact.constants import record
from fxprune.rewrite.compact.modules import holders
from fxprune.rewrite.compact.trial import NodeFailure, shapes_of_run
from fxprune.torch_private import pytree

__all__ = ["is_constant", "remove_constant_branches"]

_CONTRACTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_SHAPERS = ("reshape", "view", "expand", "flatten", "unflatten", torch.reshape, torch.flatten)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
           nn.ConvTranspose3d)  # fmt: skip
PREFIX = "constant_of_"
_READERS = ("call_module", "get_attr")
_CALLS = ("call_function", "call_method", "call_module")


def remove_constant_branches(
    gm: fx.GraphModule, dead: Collection[str], runs: tuple[tuple[Any, ...], tuple[Any, ...]]
) -> bool:
    """Put constants in the place of branches, in place; return whether there was one.

    Args:
        gm: a captured network in evaluation mode, with the shape of every node in its meta.
        dead: the parameters (weights of contractions) without an entry that counts.
        runs: two sets of inputs; what differs between them, by chance or otherwise, is no constant.
    """
    constant = _constant_nodes(gm, dead)
    ends = [node for node in constant if node.op != "get_attr" and _is_met_by_live_values(node, constant)]
    if not ends or any(_is_written(node, constant) for node in constant):
        return False
    narrow = _losing_a_batch(gm, ends, constant, runs[0])
    ends = [node for node in ends if node not in narrow]
    recorded = record(gm, runs, {node.name for node in ends}).recorded
    changed = False
    for node in ends:
        if node.name not in recorded or not _equal(*recorded[node.name]):
            continue
        value = _smallest_form(recorded[node.name][0])
        if value is not None:
            _replace(gm, node, value, constant)
            changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return changed


def is_constant(name: str) -> bool:
    """Whether a parameter is one that took the place of a branch."""
    return name.startswith(PREFIX)


# -- which nodes ----------------------------------------------------------------------------------------
def _constant_nodes(gm: fx.GraphModule, dead: Collection[str]) -> dict[fx.Node, None]:
    """The nodes whose value no input changes, in order; parameters among them."""
    found: dict[fx.Node, None] = {}
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    for node in gm.graph.nodes:
        read = node.op == "get_attr" and str(node.target) in parameters
        sources = [source for source in node.all_input_nodes if not _only_sizes(node, source)]
        follows = bool(sources) and all(source in found for source in sources)
        if read or _is_dead_layer(gm, node, dead) or (follows and _repeats(gm, node)):
            found[node] = None
    return found


def _only_sizes(node: fx.Node, source: fx.Node) -> bool:
    """Whether a number says nothing but into which shape ``node`` brings its other operand."""
    return node.target in _SHAPERS and not isinstance(source.meta.get("val"), Tensor)


def _is_dead_layer(gm: fx.GraphModule, node: fx.Node, dead: Collection[str]) -> bool:
    """Whether a contraction gives its bias alone."""
    if node.op == "call_module":
        return f"{node.target}.weight" in dead and _is_plain(gm.get_submodule(str(node.target)), _LAYERS)
    if node.op != "call_function" or node.target not in _CONTRACTIONS or len(node.args) < 2:
        return False
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    steady = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")
    return steady and isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) in dead


def _is_plain(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what one of the classes does, and nothing else."""
    return any(type(module).forward is one.forward for one in classes) and not keeps_hooks(module)


def _repeats(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may give the same for the same operands, in evaluation mode."""
    if node.op == "call_module":
        return not keeps_hooks(gm.get_submodule(str(node.target)))
    return node.op in _CALLS


def _is_written(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether something that is no constant is written into a node's memory."""
    written = (user for user in node.users if changes_input(user) and user not in constant)
    return any(node in (*user.args[:1], user.kwargs.get("out")) for user in written)


def _is_met_by_live_values(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether a constant has live readers, all of them sums and products with a value of their own shape."""
    live = [user for user in node.users if user not in constant]
    return bool(live) and all(_other(node, user) is not None for user in live)


def _other(node: fx.Node, user: fx.Node) -> fx.Node | None:
    """The live operand of a sum or product of two, if its shape and type are those of the result."""
    if user.target not in (*_SUMS, *_PRODUCTS) or user.op not in ("call_function", "call_method"):
        return None
    if len(user.args) != 2 or user.kwargs or user.args[0] is user.args[1]:
        return None
    first, second = user.args
    other = second if first is node else first
    if not isinstance(other, fx.Node) or (changes_input(user) and first is node):
        return None
    result, value, own = (one.meta.get("val") for one in (user, other, node))
    if not (isinstance(result, Tensor) and isinstance(value, Tensor) and isinstance(own, Tensor)):
        return None
    return other if result.shape == value.shape and result.dtype == value.dtype == own.dtype else None


def _losing_a_batch(
    gm: fx.GraphModule, ends: list[fx.Node], constant: Collection[fx.Node], inputs: tuple[Any, ...]
) -> set[fx.Node]:
    """The constants that meet a value of one sample, such as a mean over the batch, where there are two.

    With a batch of one the shapes do not tell. A network that takes no other batch is not asked.
    """
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    if all(len(x) > 1 for x in tensors):
        return set()
    twice = pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, inputs)
    try:
        found = shapes_of_run(gm, twice)[0]
    except NodeFailure:
        return set()
    met = [(node, user, _other(node, user)) for node in ends for user in node.users if user not in constant]
    return {
        node
        for node, user, other in met
        if other is not None and found[user.name].shape != found[other.name].shape
    }


# -- what takes its place -----------------------------------------------------------------------------------
def _smallest_form(value: Tensor) -> Tensor | None:
    """A constant with one entry along every axis on which it does not change; None if it does on several."""
    if not value.is_floating_point() or not value.numel():
        return None
    for axis, size in enumerate(value.shape):
        if size > 1 and _equal(value, value.narrow(axis, 0, 1).expand_as(value)):
            value = value.narrow(axis, 0, 1)
    return value.clone() if sum(size > 1 for size in value.shape) <= 1 else None


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding: kernels add up in another order at their edges.

    In half precision rounding is too much to tell it from a difference.
    """
    if one.shape != other.shape or one.dtype not in (torch.float32, torch.float64):
        return torch.equal(one, other)
    close = torch.finfo(one.dtype).eps * 4 * one.abs().max()
    return bool(((one - other).abs() <= close).all())


def _replace(gm: fx.GraphModule, node: fx.Node, value: Tensor, constant: Collection[fx.Node]) -> None:
    """Let a constant take the place of a node for its live readers; erase what nobody reads then."""
    trained = _is_trained(gm, node, constant)
    value = value.to(next(gm.parameters()).device)
    attribute: fx.Node | None = None
    unread = [node]
    for user in [user for user in node.users if user not in constant]:
        other = _other(node, user)
        assert other is not None
        summed = user.target in _SUMS
        if summed and (not bool(value.any()) or _into_bias(gm, other, value)):
            user.replace_all_uses_with(other)
            unread.append(user)
            continue
        if attribute is None:
            name = f"{PREFIX}{node.name}"
            gm.register_parameter(name, nn.Parameter(value, requires_grad=trained))
            with gm.graph.inserting_before(node):
                attribute = gm.graph.get_attr(name)
        user.replace_input_with(node, attribute)
    _erase(gm, unread)


def _is_trained(gm: fx.GraphModule, node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether a parameter that a constant is computed from asks for gradients."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        one = waiting.pop()
        seen.add(one)
        waiting += [source for source in one.all_input_nodes if source in constant and source not in seen]
        if one.op == "get_attr" and gm.get_parameter(str(one.target)).requires_grad:
            return True
        if one.op == "call_module":
            module = gm.get_submodule(str(one.target))
            if any(parameter.requires_grad for parameter in module.parameters()):
                return True
    return False


def _into_bias(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> bool:
    """Add a constant to the bias of the layer that gives ``node``; False if it has none to itself."""
    if node.op != "call_module" or len(node.users) != 1:
        return False
    names = (node.target, f"{node.target}.bias")
    calls = [other for other in gm.graph.nodes if other.op in _READERS and other.target in names]
    module: Any = gm.get_submodule(str(node.target))
    if len(calls) != 1 or not _is_plain(module, (*_LAYERS, nn.BatchNorm2d)):
        return False
    if not isinstance(module.bias, nn.Parameter) or len(holders(gm)[id(module.bias)]) != 1:
        return False
    axis, size = value.dim() - 1 if isinstance(module, nn.Linear) else 1, value.numel()
    if size not in (1, len(module.bias)) or (size > 1 and value.shape[axis : axis + 1] != (size,)):
        return False
    with torch.no_grad():
        bias = module.bias + value.flatten().to(module.bias)
    module.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
    return True


# -- what is gone with it -----------------------------------------------------------------------------------
def _erase(gm: fx.GraphModule, unread: list[fx.Node]) -> None:
    """Erase nodes that nobody reads, and what only they read; modules and parameters too."""
    waiting, gone, names = list(unread), set[fx.Node](), list[str]()
    while waiting:
        node = waiting.pop()
        if node in gone or node.users or node.op not in (*_CALLS, "get_attr"):
            continue
        gone.add(node)
        waiting += node.all_input_nodes
        names += [str(node.target)] if node.op in _READERS else []
        gm.graph.erase_node(node)
    read = {str(node.target) for node in gm.graph.nodes if node.op in _READERS}
    for name in sorted(set(names), key=len, reverse=True):  # what is inside goes first
        if not any(_holds(name, other) or _holds(other, name) for other in read):
            owner, _, attribute = name.rpartition(".")
            if hasattr(gm.get_submodule(owner), attribute):
                delattr(gm.get_submodule(owner), attribute)


def _holds(path: str, name: str) -> bool:
    return name == path or name.startswith(f"{path}.")
