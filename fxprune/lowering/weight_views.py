"""Follow one prunable parameter through the constants that are views of it."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.parameters import Parameters
from fxprune.lowering.rules.movement import MOVES, SHAPED_LIKE, function_of
from fxprune.lowering.rules.pointwise import MOVES_TYPE

SCALES = frozenset((operator.mul, operator.imul, torch.mul, "mul", "mul_"))
"""Functions of a parameter and a constant that multiply entry by entry."""

__all__ = ["parameter_view", "simplified", "view_of"]


def view_of(
    node: fx.Node, module: nn.Module | None, operands: list[Any], args: Any, kwargs: Any
) -> TensorFunction | None:
    """Return the function by which a node moves one constant; ``None`` for other nodes."""
    target = node.target if module is None else type(module)
    if target not in MOVES or not operands or not isinstance(operands[0], Constant):
        return None
    if target is getattr and args[1] == "data":
        return TensorFunction()  # the parameter itself: gradients, by which paths are counted, pass
    if target in SHAPED_LIKE:
        shape = tuple(node.meta["val"].shape)
        return TensorFunction.of(SHAPED_LIKE[str(target)], PREVIOUS, shape)
    if len(operands) != 1:
        return None
    return function_of(target, module, args, kwargs, lambda x: PREVIOUS)


def parameter_view(
    kind: Any, operands: list[Any], val: Tensor, view: TensorFunction | None, parameters: Parameters
) -> ir.WeightRef | None:
    """The parameter that a constant is a view of, or a re-parameterisation of in its own shape.

    ``kind`` is the function that made the constant: a change of type or device leaves the parameter as it is,
    and so does, of two parameters that are multiplied, the one that is not trained: a mask.
    """
    refs = [x for x in operands if isinstance(x, Constant) and x.weight is not None]
    shape = tuple(val.shape)
    old = operands[0].weight if view is not None else None
    if view is not None and old is not None:
        whole = (old.view or TensorFunction()).followed_by(view)
        return ir.WeightRef(old.name, shape, whole, old.direct, old.computed, old.scaled)
    same = [x.weight for x in refs if x.shape == shape and x.weight is not None]
    if len(same) == 2 and kind in SCALES:
        same = [ref for ref in same if not _is_frozen(ref, parameters)] or same
    if len(same) != 1 or not val.is_floating_point():
        return None
    if kind in MOVES_TYPE:
        return same[0]
    scaled = kind in SCALES and (same[0].scaled or not same[0].computed)
    factors = [x for x in operands if not (isinstance(x, Constant) and x.weight is same[0])]
    return replace(
        same[0], computed=True, scaled=scaled and all(_is_as_given(x, parameters) for x in factors)
    )


def _is_frozen(ref: ir.WeightRef, parameters: Parameters) -> bool:
    return ref.name is not None and not parameters.tensors[ref.name].requires_grad


def _is_as_given(factor: Any, parameters: Parameters) -> bool:
    """Whether a constant is like a buffer, or has none in it: what comes of one changes as it is cut."""
    if not isinstance(factor, Constant) or (factor.reads is not None and not factor.reads.whole):
        return False
    return factor.weight is None or _is_frozen(factor.weight, parameters)


def simplified(ref: ir.WeightRef | None, parameters: Parameters) -> ir.WeightRef | None:
    """Without a view that gives the parameter itself, as there and back again does (standardised weights)."""
    if ref is None or ref.view is None or ref.name is None:
        return ref
    shape = parameters.tensors[ref.name].shape
    if ref.shape != tuple(shape):
        return ref
    whole = torch.empty(shape, device="meta")
    seen = ref.view(whole)
    is_whole = seen is whole or (seen._base is whole and seen.stride() == whole.stride())
    return replace(ref, view=None) if is_whole else ref
