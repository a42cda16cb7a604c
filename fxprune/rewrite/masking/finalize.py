"""Masks leave a model: a masked model comes in, a copy of plain modules comes out, dense in form."""

from __future__ import annotations

import copy
from typing import NoReturn, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxprune.capture.errors import check_module
from fxprune.keywords import refuse_unknown
from fxprune.rewrite.masking.averages import IDENTITY
from fxprune.rewrite.masking.computed import computed_weights, masks_of_computed, settle, unmask_computed
from fxprune.rewrite.masking.copying import duplicate
from fxprune.rewrite.masking.graph_reads import (
    attribute_at,
    constant_region,
    evaluate,
    is_mask_product,
    unmask_reads,
)
from fxprune.rewrite.masking.masked_module import (
    Form,
    form_of,
    is_stock,
    masked_class,
    original_class,
)
from fxprune.rewrite.masking.operand_probe import example_input, recorded
from fxprune.rewrite.masking.optimizer_hook import release
from fxprune.rewrite.masking.parameters import mask_at, masked_places, parameter_at, unwrap
from fxprune.rewrite.masking.sharded import is_sharded, plain_twin
from fxprune.rewrite.masking.storage import SUFFIX, zero
from fxprune.rewrite.masking.torch_pruning import masks_of_torch, take_over

Model = TypeVar("Model", bound=nn.Module)

BAKED = "has_baked_kernel"
"""Stands in a module whose computed kernel became its weight: the class it had reads that otherwise."""


def finalize(model: Model, **others: NoReturn) -> Model:
    """A copy of a masked model with its zeros baked in: plain modules, no masks, the same outputs to the bit.

    Every module gets back the class it had; weights that were computed and masked become plain parameters,
    and so do those that ``torch.nn.utils.prune`` has pruned. One kind cannot: where a layer computes its
    kernel from its weight so that zeros do not stay zeros (weight standardisation), the *standardised and
    masked* kernel becomes the weight of a plain convolution, of torch's class above the layer's own; if
    that class does not compute the same (dynamic "same" padding), the layer keeps its own forward with
    the kernel fixed.

    Args:
        model: a masked graph module or plain module; it is not changed.

    Returns:
        The copy, of the same kind. Training it would revive pruned weights.

    Raises:
        ValueError: ``fully_shard`` has split the model, which cannot be copied then.

    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> type(finalize(layer)).__name__
    'Linear'
    """
    refuse_unknown(finalize, others)
    check_module(model)
    _refuse_sharded(model)
    final = duplicate(unwrap(model))
    for parameter, mask in _masked(final):
        zero(parameter.data, mask)  # whatever was written to the storage since, the masks decide
    return _baked(final)  # type: ignore[return-value]


def baked(model: Model) -> Model:
    """Do what :func:`finalize` does, *sharing* parameters with the model as :func:`bare` does.

    Raises as :func:`finalize` does.

    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> baked(layer).weight is layer.weight
    True
    """
    _refuse_sharded(model)
    return _baked(_twin(unwrap(model), clean=True))  # type: ignore[return-value]


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the parameters that a masked model has without its masks, tied ones once."""
    twin = _twin(unwrap(model), clean=False)
    take_over(twin)
    _strip(twin)
    return {name: parameter.shape for name, parameter in twin.named_parameters()}


def _refuse_sharded(model: nn.Module) -> None:
    if is_sharded(model):
        raise ValueError(
            "model: fully_shard has split it, so that it cannot be copied; load its full state dict (torch."
            "distributed.checkpoint.state_dict.get_model_state_dict) into a masked model that is not split"
        )


def _twin(inside: Model, *, clean: bool) -> Model:
    """Copy a model without its parameters and masks; where ``clean``, also parameters that lack zeros."""
    masked = list(masked_places(inside))
    shared = [*inside.parameters(), *(mask_at(place) for place in masked)]
    instead = {id(found): _cleaned(found, mask) for found, mask in _masked(inside)} if clean else {}
    return duplicate(inside, shared, instead)


def _baked(final: nn.Module) -> nn.Module:
    """Take out masks, classes and computed kernels, in place."""
    take_over(final)
    for module in list(final.modules()):
        form = form_of(module)
        if form is not None and form.kind == "reads" and form.operands:
            _bake_module(module, form.operands[0])
        if isinstance(module, GraphModule):
            _bake_graph(module)
    for name in masks_of_computed(final):
        settle(*computed_weights(final)[name])
    _strip(final)
    return final


def bare(model: Model) -> Model:
    """The masked model as it was: original classes, no masks, *sharing* parameters and buffers with it.

    For looking at, as capture and lowering do: its weights have the zeros, nothing holds them there. Where
    the storage of the model lacks zeros, it has a copy. Of a model that ``fully_shard`` has split, it is the
    whole one, with weights on the meta device.

    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> bare(layer).weight is layer.weight
    True
    """
    inside = unwrap(model)
    if is_sharded(inside):
        twin = plain_twin(inside)
    else:
        shared = [*inside.parameters(), *inside.buffers()]
        twin = duplicate(
            inside, shared, {id(found): _cleaned(found, mask) for found, mask in _masked(inside)}
        )
        take_over(twin)
    _strip(twin)
    return twin  # type: ignore[return-value]


def plain(model: nn.Module) -> nn.Module:
    """Return a model without masks, in one piece: itself where it is so, else :func:`bare` of it."""
    inside = unwrap(model)
    masked = next(masked_places(inside), None) is not None
    has_masks = masked or bool(masks_of_computed(inside)) or bool(masks_of_torch(inside))
    return bare(model) if has_masks or is_sharded(model) else model


def _masked(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    return [(parameter_at(place), mask_at(place)) for place in masked_places(model)]


def _cleaned(parameter: nn.Parameter, mask: torch.Tensor) -> nn.Parameter:
    """The parameter itself, or a copy with zeros where the mask has them and the storage does not."""
    if parameter.is_meta or not bool(((parameter.data != 0) & ~mask).any()):
        return parameter
    copied = nn.Parameter(parameter.data.clone(), parameter.requires_grad)
    zero(copied.data, mask)
    return copied


def _strip(model: nn.Module) -> None:
    """Takes classes, masks and multiplications out again, in place."""
    unmask_computed(model)
    for module in model.modules():
        if isinstance(module, GraphModule):
            unmask_reads(module)
    for _, module, attribute in list(masked_places(model)):
        module._buffers.pop(attribute + SUFFIX, None)
    for module in model.modules():
        form = form_of(module)
        if form is not None and form.kind != "frozen":
            module.__class__ = original_class(module)
        module.__dict__.pop("mask_provenance", None)
        module.__dict__.pop(IDENTITY, None)
        release(module)


def _bake_module(module: nn.Module, attribute: str) -> None:
    """Makes the kernel that a layer computes from its weight the weight itself."""
    weight = module._parameters[attribute]
    assert weight is not None
    stock = next((base for base in original_class(module).__mro__ if is_stock(base)), None)
    inputs = [example_input(module, weight, margin) for margin in (2, 3, 6)]
    with torch.no_grad():
        kernel = recorded(module.forward, inputs[0], weight.shape)[-1].detach().clone()
        expected = [module.forward(*one) for one in inputs]
    # A parameter shared with another layer must not be overwritten there.
    module._parameters[attribute] = nn.Parameter(kernel, weight.requires_grad)
    for name in module._parameters:  # the bias may have had a mask too; its zeros are in it
        module._buffers.pop(name + SUFFIX, None)
    vars(module)[BAKED] = True
    frozen = masked_class(original_class(module), Form("frozen", operands=(attribute,)))
    if stock is not None and attribute == "weight":
        module.__class__ = stock
        if _same(module, inputs, expected):
            for name in set(module._parameters) - {"weight", "bias"}:
                del module._parameters[name]
            return
    module.__class__ = frozen


def _same(module: nn.Module, inputs: list[tuple[torch.Tensor, ...]], expected: list[torch.Tensor]) -> bool:
    with torch.no_grad():
        for one, wanted in zip(inputs, expected, strict=True):
            found = module.forward(*one)
            if found.shape != wanted.shape or not torch.equal(found, wanted):
                return False
    return True


def _bake_graph(gm: GraphModule) -> None:
    """Replaces every masked kernel operand that a graph computes from parameters by a parameter."""
    for node in list(gm.graph.nodes):
        if not is_mask_product(gm, node) or node.args[0].op == "get_attr":
            continue
        region = constant_region(node)
        assert region is not None
        name = str(node.args[1].target)[: -len(SUFFIX)]
        with torch.no_grad():
            kernel = nn.Parameter(evaluate(gm, region).detach().clone(), attribute_at(gm, name).requires_grad)
        path, _, attribute = name.rpartition(".")
        owner = gm.get_submodule(path)
        if _read_elsewhere(gm, name, region):
            attribute += "_kernel"
            name += "_kernel"
        with gm.graph.inserting_before(node):
            read = gm.graph.get_attr(name) if attribute in owner._parameters else None
            owner._parameters[attribute] = kernel
            read = read or gm.graph.get_attr(name)
        read.meta = copy.copy(node.meta)
        vars(gm)[BAKED] = True
        node.replace_all_uses_with(read)
        for dead in reversed(region):
            if not dead.users:
                gm.graph.erase_node(dead)
    gm.recompile()


def _read_elsewhere(gm: GraphModule, name: str, region: list[Node]) -> bool:
    """Whether something outside of ``region`` depends on the parameter too, not by the region's result."""
    inside, dependent = set(region), set[Node]()
    for node in gm.graph.nodes:
        is_read = node.op == "get_attr" and node.target == name
        if is_read and node not in inside:
            return True
        if node in inside and (is_read or not dependent.isdisjoint(node.all_input_nodes)):
            dependent.add(node)
    return any(user not in inside for node in dependent - {region[-1]} for user in node.users)
