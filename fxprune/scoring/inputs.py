"""Measure what every weight reads: the norm of its inputs over some batches.

The model runs, and every convolution and matrix product that one of the weights takes part in is seen where
PyTorch dispatches it, whichever module or function called it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.scoring.contract import Problem
from fxprune.scoring.data import Batch, pieces
from fxprune.scoring.distributed import average
from fxprune.scoring.gradients import run_at
from fxprune.torch_private import TorchDispatchMode

__all__ = ["input_norms"]

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
"""The matrix products, and the place of their first factor."""


def input_norms(
    problem: Problem, weights: Mapping[str, Tensor], some: Sequence[Batch], method: str
) -> dict[str, Tensor]:
    """Return, for every weight, the Euclidean norm of the inputs that it is multiplied with.

    Args:
        problem: whose model runs; the caller sets its mode.
        weights: the effective weights by name, as :func:`fxprune.scoring.gradients.masked` gives them.
        some: the batches; norms run over all their samples and positions.
        method: what warnings call the method.

    Returns:
        Name -> a tensor of the weight's shape on the device of ``problem.weights``, of ones for weights whose
        inputs no product showed (their operand is computed from them); a warning names the first of those.
        With a ``problem.group``, over the batches of all its processes, up to one factor.
    """
    watch = _Watch(weights)
    for batch in some:
        for piece, _ in pieces(problem, batch):
            # Gradients are on: fused attention, which hides its products, is for inference only.
            with watch:
                run_at(problem, weights, piece, method)
    hidden = [name for name in weights if name not in watch.squares]
    if hidden:
        warnings.warn(
            f"method {method!r}: the inputs of {len(hidden)} weights are not seen, {hidden[0]!r} first; "
            "they are ranked by magnitude",
            stacklevel=2,
        )
    average((watch.squares[name] for name in weights if name in watch.squares), problem.group)
    return {
        name: (watch.squares[name].sqrt() if name in watch.squares else torch.ones_like(weight)).to(
            problem.weights[name].device
        )
        for name, weight in weights.items()
    }


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the squares of the inputs of every weight in ``squares``, by name, while it is active."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self.squares: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self._convolution(result, *args)
        elif func in PRODUCTS:
            first = PRODUCTS[func]
            self._product(args[first], args[first + 1])
        return result

    def _name_of(self, operand: Tensor) -> str | None:
        return self.names.get(operand.untyped_storage().data_ptr())

    def _sum_for(self, name: str) -> Tensor:
        if name not in self.squares:
            # In half precision squares overflow, and sums of many lose the small ones.
            weight = self.weights[name]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.squares[name] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        return self.squares[name]

    def _convolution(self, result: Tensor, x: Tensor, weight: Tensor, bias: Any, *geometry: Any) -> None:
        """The gradient of the weight, if every output has the gradient 1 and every input is squared."""
        name = self._name_of(weight)
        if name is None:
            return
        sizes = None if bias is None else [len(bias)]
        total, mask = self._sum_for(name), [False, True, False]
        ones, wide = torch.ones_like(result, dtype=total.dtype), x.to(total.dtype).square()
        squares = aten.convolution_backward(ones, wide, weight.to(total.dtype), sizes, *geometry, mask)[1]
        total.add_(squares.view_as(total))

    def _product(self, left: Tensor, right: Tensor) -> None:
        """The weight is the right factor, read as it is or transposed, or the left one."""
        for operand, other, contracted in ((right, left, -2), (left, right, -1)):
            name = self._name_of(operand)
            if name is None:
                continue
            # A matrix of sums with the operand's geometry lies where the operand lies in the parameter.
            total = self._sum_for(name)
            offset = operand.storage_offset() - self.weights[name].storage_offset()
            place = total.as_strided(operand.shape, operand.stride(), offset)
            squares = other.to(total.dtype).square().sum(-2 if contracted == -2 else -1)
            line = squares.unsqueeze(-1) if contracted == -2 else squares.unsqueeze(-2)
            if operand.dim() > 2 and operand.stride(0) == 0:  # one matrix for all of a batch
                place, line = place[0], line.sum(0)
            place.add_(line)
