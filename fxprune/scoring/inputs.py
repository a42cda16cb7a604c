"""Measure what every weight reads: the norm of its inputs over some batches.

The model runs, and every convolution and matrix product that one of the weights takes part in is seen where
PyTorch dispatches it, whichever module or function called it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fxprune.scoring.contract import Problem
from fxprune.scoring.data import Batch, seeded
from fxprune.scoring.distributed import average, gathered
from fxprune.scoring.walk import arguments_of, quiet
from fxprune.torch_private import TorchDispatchMode

__all__ = ["GROUPED", "PRODUCTS", "InputNorms", "input_norms"]

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
"""The matrix products, and the place of their first factor."""
GROUPED = getattr(aten._grouped_mm, "default", None) if hasattr(aten, "_grouped_mm") else None
"""The product of runs of rows and a stack of matrices, as mixtures of experts have it."""

CACHED = 1 << 17
"""Numbers that are squared at a time."""

_Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where an operand lies in the storage of its parameter: offset, shape, strides."""


class InputNorms:
    """Hold the norms of what weights read, one number for each input, not for each weight.

    ``squares``: name -> the places in the parameter that were operands, each with sums of squares that
    broadcast to its shape. ``home``: the device of what :meth:`of` returns.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], squares: Mapping[str, dict[_Place, Tensor]], home: torch.device
    ) -> None:
        self.weights, self.squares, self.home = weights, squares, home

    def of(self, name: str) -> Tensor:
        """Return the norms in the weight's shape; ones where no product showed its inputs."""
        weight, places = self.weights[name], self.squares.get(name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not places:
            return torch.ones(weight.shape, dtype=dtype, device=self.home)
        # With the strides of the weight, the sums of an operand lie where the operand lies.
        total = torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device)
        ((offset, shape, stride), squares), *others = places.items()
        if not others and math.prod(shape) == weight.numel():
            total.as_strided(shape, stride, offset - weight.storage_offset()).copy_(squares.sqrt())
            return total.to(self.home)
        total.zero_()
        for (offset, shape, stride), squares in places.items():
            total.as_strided(shape, stride, offset - weight.storage_offset()).add_(squares)
        return total.sqrt_().to(self.home)


def input_norms(
    problem: Problem, weights: Mapping[str, Tensor], some: Sequence[Batch], method: str
) -> InputNorms:
    """Return, for every weight, the Euclidean norm of the inputs that it is multiplied with.

    Args:
        problem: whose model runs once for every batch, in evaluation mode and without gradients.
        weights: the effective weights by name, as :func:`fxprune.scoring.gradients.masked` gives them.
        some: the batches; norms run over all their samples and positions.
        method: what warnings call the method.

    Returns:
        The norms; ones for weights whose inputs no product showed (their operand is computed from them), and
        equal ones for experts and layers whose inputs were all zero, or none. A warning names both.
        With a ``problem.group``, over the batches of all its processes, up to one factor.

    Raises ``ValueError`` for inputs of a layer that are not finite, and for tokens without a row.
    """
    watch = _Watch(weights)
    with quiet(problem.model, method), seeded(problem):
        for call in arguments_of(problem, some, method):
            with watch:
                torch.func.functional_call(problem.model, dict(weights), call.args, dict(call.kwargs))
    if problem.group is not None:
        watch.squares = _averaged(watch.squares, problem.group)
    names = _fill_unused(watch.squares, method)
    hidden = [name for name in weights if name not in watch.squares]
    if hidden:
        warnings.warn(
            f"method {method!r}: the inputs of {len(hidden)} weights are not seen, {hidden[0]!r} first; "
            "they are ranked by magnitude",
            stacklevel=2,
        )
    if names:
        rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
        warnings.warn(
            f"method {method!r}: no inputs are seen of {', '.join(names[:8])}{rest}; they are ranked by "
            "magnitude",
            stacklevel=2,
        )
    home = next((weight.device for weight in problem.weights.values()), problem.device)
    return InputNorms(weights, watch.squares, home)


def _averaged(
    squares: Mapping[str, dict[_Place, Tensor]], group: ProcessGroup
) -> dict[str, dict[_Place, Tensor]]:
    """The means over all processes; where one of them saw nothing, it adds zeros."""
    every: dict[tuple[str, _Place], tuple[tuple[int, ...], str]] = {}
    own = {
        (name, place): (tuple(tensor.shape), str(tensor.dtype))
        for name, places in squares.items()
        for place, tensor in places.items()
    }
    for other in gathered(own, group):
        every |= other
    found: dict[str, dict[_Place, Tensor]] = {}
    for name, place in sorted(every, key=repr):
        shape, dtype = every[name, place]
        tensor = squares.get(name, {}).get(place)
        if tensor is None:
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype.rpartition(".")[2]))
        average([tensor], group)
        found.setdefault(name, {})[place] = tensor
    return found


def _fill_unused(squares: Mapping[str, dict[_Place, Tensor]], method: str) -> list[str]:
    """Give matrices whose inputs were all zero, or none, the mean of the others; return their names."""
    names = []
    for name, places in squares.items():
        for (_, shape, _), one in places.items():
            stack = one.flatten(1) if len(shape) == 3 and len(one) > 1 else one.reshape(1, -1)
            sums = stack.sum(1)
            if not bool(torch.isfinite(sums).all()):
                raise ValueError(
                    f"method {method!r}: the inputs of {name!r} are NaN or infinite; look at the layers "
                    "before it, or take a wider dtype"
                )
            dead = sums == 0
            if bool(dead.any()) and len(places) == 1:
                stack[dead] = 1.0 if bool(dead.all()) else float(stack[~dead].mean())
                indices = dead.nonzero().flatten().tolist()
                names += [f"{name}[{index}]" for index in indices] if len(stack) > 1 else [name]
    return names


def _sums_of_squares(x: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """The sums of squares along an axis, in ``dtype``; of rows by parts that stay in the cache."""
    if x.dim() > 2 or axis != -2:
        return x.to(dtype).square().sum(axis)
    total = x.new_zeros(x.shape[1], dtype=dtype)
    for part in torch.split(x, max(1, CACHED // max(x.shape[1], 1))):
        wide = part.to(dtype)
        total += (wide * wide).sum(0)
    return total


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the squares of the inputs of every weight in ``squares``, by name, while it is active."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self.squares: dict[str, dict[_Place, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self._convolution(result, *args)
        elif func in PRODUCTS:
            first = PRODUCTS[func]
            self._product(args[first], args[first + 1])
        elif func is GROUPED and args[0].dim() == 2 and args[1].dim() == 3:
            self._grouped(*args[:3])
        return result

    def _name_of(self, operand: Tensor) -> str | None:
        return self.names.get(operand.untyped_storage().data_ptr())

    def _add(self, name: str, operand: Tensor, squares: Tensor) -> None:
        place = (int(operand.storage_offset()), tuple(operand.shape), operand.stride())
        places = self.squares.setdefault(name, {})
        places[place] = places[place] + squares if place in places else squares

    def _wide(self, name: str) -> torch.dtype:
        """The dtype of sums: in half precision squares overflow, and sums of many lose the small ones."""
        return torch.promote_types(self.weights[name].dtype, torch.float32)

    def _convolution(
        self,
        result: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> None:
        """The gradient of the weight, if every output has the gradient 1 and every input is squared.

        All outputs of a group read the same, and the gradient is linear: one of them and one image, the sum
        over all samples, are enough.
        """
        name = self._name_of(weight)
        if name is None:
            return
        dtype, axes = self._wide(name), weight.dim() - 2
        square = x.to(dtype).square().reshape(-1, *x.shape[-axes - 1 :]).sum(0, keepdim=True)
        ones = square.new_ones(1, groups, *result.shape[-axes:])
        like = weight[:, :1] if transposed else weight[:: len(weight) // groups]
        how = (stride, padding, dilation, transposed, output_padding, groups, [False, True, False])
        squares = aten.convolution_backward(ones, square, like.to(dtype), None, *how)[1]
        if not transposed and groups > 1:
            squares = squares.repeat_interleave(len(weight) // groups, 0)
        self._add(name, weight, squares)

    def _product(self, left: Tensor, right: Tensor) -> None:
        """The weight is the right factor, read as it is or transposed, or the left one."""
        for operand, other, contracted in ((right, left, -2), (left, right, -1)):
            name = self._name_of(operand)
            if name is None:
                continue
            squares = _sums_of_squares(other, contracted, self._wide(name))
            squares = squares.unsqueeze(-1 if contracted == -2 else -2)
            if operand.dim() > 2 and operand.stride(0) == 0:  # one matrix for all of a batch
                operand, squares = operand[0], squares.sum(0)
            self._add(name, operand, squares)

    def _grouped(self, rows: Tensor, stack: Tensor, ends: Tensor) -> None:
        """Runs of rows, each times a matrix of its own."""
        name = self._name_of(stack)
        if name is None:
            return
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        owners = torch.arange(len(stack), device=rows.device).repeat_interleave(counts)
        wide = rows[: len(owners)].to(self._wide(name))
        sums = wide.new_zeros(len(stack), wide.shape[1]).index_add_(0, owners, wide * wide)
        self._add(name, stack, sums.unsqueeze(-1))
