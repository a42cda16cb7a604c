"""Prove that a model is as sparse as its masks say."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune.capture.errors import check_module
from fxprune.capture.tracer.assigned_data import assign_data_
from fxprune.keywords import refuse_unknown
from fxprune.rewrite.masking.averages import foreign_masks
from fxprune.rewrite.masking.computed import mask_of_computed, masks_of_computed, settled
from fxprune.rewrite.masking.graph_reads import (
    attribute_at,
    constant_region,
    evaluate,
    is_mask_product,
    mask_of,
    only_writes,
)
from fxprune.rewrite.masking.masked_module import Form, form_of, owner_and_attribute
from fxprune.rewrite.masking.operand_probe import (
    FAILURES,
    SAMPLE,
    OperandRecorder,
    example_input,
    private_twin,
)
from fxprune.rewrite.masking.optimizer_hook import living
from fxprune.rewrite.masking.parameters import Place, join, mask_at, masked_places, parameter_at, tied, unwrap
from fxprune.rewrite.masking.sharded import home, reshard
from fxprune.rewrite.masking.storage import SUFFIX, local_part
from fxprune.rewrite.masking.weight_functions import KERNELS, weight_operand
from fxprune.sharded_types import is_dtensor


def verify(model: nn.Module, **others: NoReturn) -> None:
    """Prove, for every masked parameter, mask == storage == the kernel that data meets.

    Mask and storage are compared. Then each layer runs, as a copy on a small random input: the weight that
    enters its convolution or linear map must be zero where the mask is, and so must the gradient of the
    parameter. In a graph, the operands computed from parameters are evaluated. A layer whose input cannot be
    guessed from its weight's shape (a module of one's own), and one that is sharded, is checked for mask and
    storage alone.

    Args:
        model: a masked graph module or plain module. It is not changed.

    Raises:
        ValueError: the model has no masks.
        RuntimeError: the first parameter for which it does not hold, by name.

    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> verify(layer)
    """
    refuse_unknown(verify, others)
    check_module(model)
    model = unwrap(model)
    reshard(model)
    _check_bypass(model)
    found = list(masked_places(model))
    computed = masks_of_computed(model)
    if not found and not computed:
        raise ValueError("model: it has no masks, so there is nothing to verify; set masks first")
    plain = settled(model) if computed else model
    for name, mask in computed.items():
        _demand_zeros(name, "in the weight that is computed", plain.get_parameter(name).detach(), mask)
    everywhere = tied(model)
    for place in found:
        _check_storage(place, everywhere[id(parameter_at(place))])
        _check_average(place)
    for path, module in model.named_modules():
        form = form_of(module)
        if isinstance(module, GraphModule):
            _check_graph(path, module)
        elif any(is_dtensor(parameter) for parameter in module.parameters()):
            continue  # a sharded layer cannot run by itself
        elif form is not None and form.kind in ("stock", "reads"):
            _check_module(path, module, form)


def _check_bypass(model: nn.Module) -> None:
    """Masks whose parameter is gone: something recomputes the weight."""
    for path, module in model.named_modules():
        for name in module._buffers if form_of(module) is not None else ():
            attribute = name.removesuffix(SUFFIX)
            is_computed = mask_of_computed(module, attribute) is not None
            if name.endswith(SUFFIX) and attribute not in module._parameters and not is_computed:
                raise RuntimeError(
                    f"{join(path, name[: -len(SUFFIX)])} was re-parametrised after it was masked: what is"
                    " stored and what is computed may differ; remove the re-parametrisation"
                )
        if form_of(module) is not None and "forward" in module.__dict__:
            raise RuntimeError(
                f"{join(path, 'weight')} may bypass its mask: forward was replaced on the"
                f" {type(module).__name__} object; put it into a subclass and mask that"
            )


def _check_storage(place: Place, same: list[Place]) -> None:
    name = join(place[0], place[2])
    parameter, mask = parameter_at(place), mask_at(place)
    if mask.dtype != torch.bool or mask.shape != parameter.shape or mask.device != home(parameter):
        raise RuntimeError(
            f"{name} ({tuple(parameter.shape)}, {parameter.device}) does not fit its mask"
            f" ({mask.dtype}, {tuple(mask.shape)}, {mask.device})"
        )
    for other in same:
        if other[1]._buffers.get(other[2] + SUFFIX) is None:
            raise RuntimeError(f"{name} is tied to {join(other[0], other[2])}, which has no mask")
        if not torch.equal(mask_at(other), mask):
            raise RuntimeError(f"{name} and {join(other[0], other[2])} are tied, but their masks differ")
    _demand_zeros(name, "in storage; set its mask again", *local_part(parameter.detach(), mask))


def _check_average(place: Place) -> None:
    """Raise if a copy of a masked model has a mask that came of averaging, and is not the model's."""
    path, module, attribute = place
    if attribute in foreign_masks(module, living()):
        raise RuntimeError(
            f"{join(path, attribute)}: its mask was overwritten (averaged, perhaps), and not with that of the"
            " model it is a copy of; give it the model's by fxprune.set_masks(copy, fxprune.masks(model))"
        )


def _demand_zeros(name: str, where: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    if tensor.is_meta:
        return
    pruned = tensor.masked_fill(mask.to(tensor.device), 0)
    strange = int((~pruned.isfinite()).sum())
    if strange:
        raise RuntimeError(
            f"{name}: {strange} pruned weights are NaN or infinite {where}; look for what made the values of"
            " this layer so, masks do not"
        )
    alive = int(pruned.count_nonzero())
    if alive:
        raise RuntimeError(f"{name}: {alive} pruned weights are not zero {where}")


def _check_module(path: str, module: nn.Module, form: Form) -> None:
    """Run a copy of one layer and look at the weights it multiplies with, and at its gradients."""
    targets = form.targets or ("weight",)
    twin = private_twin(module, torch.float32)
    for parameter in twin.parameters():
        parameter.requires_grad_()
    places = [owner_and_attribute(twin, target) for target in targets]
    weights = [getattr(owner, attribute) for owner, attribute in places]
    masks = [getattr(owner, attribute + SUFFIX) for owner, attribute in places]
    try:
        inputs = tuple(value.requires_grad_() for value in example_input(twin, weights[0]))
        with OperandRecorder() as recorder:
            result = twin.forward(*inputs)
        first = result[0] if isinstance(result, tuple) else result
        loss = (first * torch.randn_like(first)).sum()
        grads = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    except FAILURES:
        return
    for target, weight, mask, grad in zip(targets, weights, masks, grads, strict=True):
        name = join(path, target)
        for operand in [*recorder.seen, *recorder.factors]:
            if _is_computed_from(operand, weight, inputs):
                may_move = form.kind == "reads"
                if not (may_move and operand.shape != mask.shape and _picks_entries(operand, weights)):
                    _check_operand(name, operand, mask, masks, may_move=may_move)
        if grad is not None:
            _demand_zeros(name, "in the gradient", grad, mask)


def _is_computed_from(operand: torch.Tensor, weight: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether ``operand`` depends on ``weight`` and not on the layer's input."""
    if not operand.requires_grad:
        return False
    slopes = torch.autograd.grad(operand.sum(), [weight, *inputs], allow_unused=True, retain_graph=True)
    return slopes[0] is not None and all(slope is None for slope in slopes[1:])


def _picks_entries(operand: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """Whether entries of an operand are single weights, scaled at most, and therefore zero where these are.

    How many there are of each does not matter then: the input may pick the matrix of one expert for all rows.
    """
    places = operand.detach().flatten().nonzero().flatten()
    for place in places[:: max(1, len(places) // SAMPLE)].tolist():
        slopes = torch.autograd.grad(operand.flatten()[place], weights, allow_unused=True, retain_graph=True)
        if sum(int(slope.count_nonzero()) for slope in slopes if slope is not None) != 1:
            return False
    return True


def _check_operand(
    name: str, operand: torch.Tensor, mask: torch.Tensor, masks: list[torch.Tensor], *, may_move: bool
) -> None:
    """Raise unless a computed weight has the zeros of its mask, or as large a share of zeros."""
    # A layer of one's own may move its weight (transpose it): the zeros are elsewhere, but as many.
    number, kept = int(operand.count_nonzero()), int(mask.count_nonzero())
    is_sparse = number * mask.numel() <= kept * operand.numel()
    if may_move and is_sparse:
        return
    if operand.shape == mask.shape:
        # Square attention weights share a shape: the operand must be the kernel of one of the masks.
        rivals = [other for other in masks if other.shape == mask.shape]
        if not any((operand.masked_fill(other, 0) == 0).all() for other in rivals):
            _demand_zeros(name, "in the kernel that data meets", operand, mask)
    elif not is_sparse:
        raise RuntimeError(
            f"{name}: the layer computes from it a weight of shape {tuple(operand.shape)} of which"
            f" {number / operand.numel():.2%} is not zero, where the mask keeps {kept / mask.numel():.2%}"
        )


def _reads_storage(node: torch.fx.Node) -> bool:
    """Whether a node reads or writes what is stored, beside its gradient: that is zero where the mask is."""
    return node.target is assign_data_ or (node.target is getattr and "data" in node.args)


def _check_graph(path: str, gm: GraphModule) -> None:
    """Every read of a masked parameter is multiplied; every operand computed from one has its zeros."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and mask_of(gm, node.target) is not None:
            for user in node.users:
                if not (is_mask_product(gm, user) or _reads_storage(user) or only_writes(user, node)):
                    raise RuntimeError(f"{join(path, node.target)} is read by {user.name} without its mask")
        if node.op == "call_function" and node.target in KERNELS:
            operand = weight_operand(node.args, node.kwargs)
            region = constant_region(operand) if isinstance(operand, torch.fx.Node) else None
            reads = [source for source in region or () if source.op == "get_attr"]
            if any(is_dtensor(attribute_at(gm, str(source.target))) for source in reads):
                continue  # whole only in a forward
            for source in reads:
                if mask_of(gm, str(source.target)) is not None:
                    mask = mask_of(gm, str(source.target))
                    assert mask is not None
                    assert region is not None
                    with torch.no_grad():
                        value = evaluate(gm, region)
                    spread = bool(value.count_nonzero() > mask.count_nonzero())
                    if value.shape == attribute_at(gm, str(source.target)).shape and spread:
                        _demand_zeros(
                            join(path, str(source.target)), "in the kernel that data meets", value, mask
                        )
