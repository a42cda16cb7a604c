"""Ask methods about models that ``fully_shard`` has split as about any others.

A method that scores handles the rows that its process holds, and learns from the others how many weights lie
above a score; one that looks at shapes alone finds the whole masks in every process. Weights that are to be
pruned are never gathered. Masks are, for they are whole in every process in the end; and so are the layers
that are not to be pruned, where a method of the second kind looks at their zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fxprune.methods import Method, Problem, agree, as_dtensors, local_rows
from fxprune.methods import get as get_method
from fxprune.methods import names as list_methods
from fxprune.request import Request
from fxprune.rewrite.masking.parameters import mask_at, masked_places
from fxprune.rewrite.masking.sharded import home, is_sharded
from fxprune.sharded_types import is_dtensor
from fxprune.sparsity.granularity import NM, WEIGHT
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.sharded import own_part

__all__ = ["Question", "asked", "check"]


@dataclass
class Question:
    """A problem as a method is asked it, and the masks that it finds; where it is split, parts of them."""

    problem: Problem
    masks: Masks = field(default_factory=dict)


@contextmanager
def asked(problem: Problem, model: nn.Module, method: Method) -> Iterator[Question]:
    """Split a problem on entering, where ``model`` is split, and gather the masks on leaving.

    ``problem`` is about the whole network. Inside, ``masks`` are to be set to what ``method`` found;
    afterwards they are whole, and the same in all processes. Of a model that is not split, both are as they
    are.
    """
    if not is_sharded(model):
        yield Question(problem)
        return
    question = Question(_split(problem, model, method))
    with _unmasked(model):
        yield question
    question.masks = _gathered(question.masks, question.problem, model)


def check(model: nn.Module, wish: Request) -> None:
    """``ValueError`` for what cannot be done with a model that ``fully_shard`` has split, if it has."""
    if not is_sharded(model):
        return
    if wish.returns != "inplace":
        raise ValueError(
            f"returns={wish.returns!r}: fully_shard has split the model, which cannot be copied then; pass "
            "returns='inplace', and it is pruned itself"
        )
    remedy = "prune the model before fully_shard"
    if wish.method.shards == "no":
        able = ", ".join(name for name in list_methods() if get_method(name).shards != "no")
        raise ValueError(
            f"method {wish.method.name!r} needs whole parameters, but fully_shard has split them; {remedy}, "
            f"or take one of {able}"
        )
    if wish.method.shards == "rows" and wish.granularity != WEIGHT and not isinstance(wish.granularity, NM):
        raise ValueError(
            f"granularity {wish.granularity}: its groups may lie in several processes; {remedy}, or "
            "take 'weight' or 'nm(...)'"
        )
    if wish.on_collapse == "repair":
        raise ValueError(f"on_collapse='repair' needs whole parameters; {remedy}, or take 'warn'")
    if wish.reinit:
        raise ValueError("reinit=True: fully_shard has split the model; draw its weights anew before that")
    if wish.device is not None:
        raise ValueError(f"device={wish.device!r}: a model that fully_shard has split is scored where it is")


def _split(problem: Problem, model: nn.Module, method: Method) -> Problem:
    """``problem``, about the whole network on the meta device, as ``method`` can solve it for ``model``."""
    rows, group = local_rows(model, problem.weights)
    device = home(model.get_parameter(next(iter(rows))))
    if method.shards == "shapes":
        for name in problem.graph.kernels.keys() - rows.keys():
            _fill(problem.model, name, model.get_parameter(name).detach())
        masks = {name: mask.to(device) for name, mask in problem.masks.items()}
        return replace(problem, masks=masks, device=device, group=None)
    own: Masks = {}
    for name, row in rows.items():
        parameter = model.get_parameter(name)
        assert is_dtensor(parameter)
        own[name] = own_part(problem.masks[name].to(device), parameter).to(row.device)
    return replace(problem, model=model, weights=rows, masks=own, device=device, group=None, shards=group)


@contextmanager
def _unmasked(model: nn.Module) -> Iterator[None]:
    """The model without its masks, in place: as ``bare``, which such a model has without values only."""
    masks = [mask_at(place) for place in masked_places(model)]
    before = [mask.clone() for mask in masks]
    try:
        for mask in masks:
            mask.fill_(True)
        yield
    finally:
        for mask, values in zip(masks, before, strict=True):
            mask.copy_(values)


def _gathered(masks: Mapping[str, torch.Tensor], problem: Problem, model: nn.Module) -> Masks:
    """The whole masks, the same in all processes that hold a part of ``model``; ``RuntimeError`` if not."""
    whole = dict(masks)
    if problem.shards is not None:
        placed = as_dtensors(whole, model)
        whole = {name: mask.full_tensor() for name, mask in placed.items()}
    parameter = model.get_parameter(next(iter(whole)))
    assert is_dtensor(parameter)
    for dim in range(parameter.device_mesh.ndim):
        agree(whole, parameter.device_mesh.get_group(dim))
    return whole


def _fill(gm: nn.Module, name: str, values: torch.Tensor) -> None:
    """Gives a parameter of the captured network the values that it has in the model."""
    path, _, attribute = name.rpartition(".")
    whole = values.full_tensor() if is_dtensor(values) else values
    gm.get_submodule(path)._parameters[attribute] = nn.Parameter(whole, requires_grad=False)
