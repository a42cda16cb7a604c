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
from fxprune.scoring.copies import Copies, Layout, places_in
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

_Place = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Where an operand lies in the storage of its parameter: offset, shape, strides; and how many matrices it
stacks, each with inputs of its own."""


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
        if _is_one_operand(weight, places):
            total = _zeros(weight, dtype)
            ((place, squares),) = places.items()
            _part(total, weight, place).copy_(squares.sqrt())
            return total.to(self.home)
        return _sum_of(weight, places, dtype).sqrt_().to(self.home)


def _zeros(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros with the strides of a weight: what belongs to an operand lies where the operand lies."""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device).zero_()


def _part(whole: Tensor, weight: Tensor, place: _Place) -> Tensor:
    """The part of ``whole``, made by :func:`_zeros`, that belongs to an operand."""
    offset, shape, stride, _ = place
    return whole.as_strided(shape, stride, offset - weight.storage_offset())


def _is_one_operand(weight: Tensor, places: Mapping[_Place, Tensor]) -> bool:
    """Whether a weight was read as a whole, and in one way."""
    return len(places) == 1 and math.prod(next(iter(places))[1]) == weight.numel()


def _sum_of(weight: Tensor, places: Mapping[_Place, Tensor], dtype: torch.dtype) -> Tensor:
    """The sums of squares of all operands, in the weight's shape."""
    total = _zeros(weight, dtype)
    for place, squares in places.items():
        _part(total, weight, place).add_(squares)
    return total


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
        The norms. They are ones for a weight that no product showed (its operand is computed from it), and
        one number for all matrices in a weight that no product showed, or whose inputs were all zero or none
        (experts, keys of a packed projection, a layer as a whole): the root of the mean square of the norms
        of the others, or 1. A warning names both. A single input that was always zero has the norm 0.
        With a ``problem.group``, over the batches of all its processes, up to one factor.

    Raises ``ValueError`` for inputs of a layer that are not finite, and for tokens without a row.
    """
    watch = _Watch(weights)
    with quiet(problem.model, method), seeded(problem):
        for call in arguments_of(problem, some, method):
            with watch:
                torch.func.functional_call(problem.model, dict(weights), call.args, dict(call.kwargs))
    if problem.group is not None:
        watch.squares = _averaged(watch.squares, problem.group, problem.device)
    names = _fill_unused(weights, watch.squares, method)
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
    squares: Mapping[str, dict[_Place, Tensor]], group: ProcessGroup, device: torch.device
) -> dict[str, dict[_Place, Tensor]]:
    """The means over all processes; where one of them saw nothing, it adds zeros on ``device``."""
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
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype.rpartition(".")[2]), device=device)
        average([tensor], group)
        found.setdefault(name, {})[place] = tensor
    return found


def _fill_unused(
    weights: Mapping[str, Tensor], squares: dict[str, dict[_Place, Tensor]], method: str
) -> list[str]:
    """Give matrices whose inputs were all zero, or none, the mean of the others; return their names."""
    names: list[str] = []
    for name, places in squares.items():
        live: dict[_Place, Tensor] = {}
        for place, one in places.items():
            sums = one.reshape(place[-1], -1).sum(1)
            if not bool(torch.isfinite(sums).all()):
                raise ValueError(
                    f"method {method!r}: the inputs of {name!r} are NaN or infinite; look at the layers "
                    "before it, or take a wider dtype"
                )
            live[place] = (sums != 0).view(-1, *[1] * (one.dim() - 1))
        if not _is_one_operand(weights[name], places):
            names += _fill_apart(weights[name], name, places, live)
            continue
        ((place, one),) = places.items()
        if not bool(live[place].all()):
            places[place] = _filled(one, live[place].expand_as(one))
            dead = (~live[place]).flatten().nonzero().flatten().tolist()
            names += [f"{name}[{index}]" for index in dead] if place[-1] > 1 else [name]
    return names


def _fill_apart(
    weight: Tensor, name: str, places: dict[_Place, Tensor], live: Mapping[_Place, Tensor]
) -> list[str]:
    """The same for a weight that is read in several places, or not as a whole: what no live matrix has."""
    reached = _zeros(weight, torch.bool)
    for place, alive in live.items():
        _part(reached, weight, place).logical_or_(alive)
    if bool(reached.all()):
        return []
    dtype = next(iter(places.values())).dtype
    total = _filled(_sum_of(weight, places, dtype), reached)
    places.clear()
    places[(int(weight.storage_offset()), tuple(weight.shape), weight.stride(), 1)] = total
    rows = reached.reshape(len(reached), -1)
    if not bool(reached.any()) or bool((rows.any(1) != rows.all(1)).any()):
        return [name]
    runs: list[list[int]] = []
    for row in (~rows.any(1)).nonzero().flatten().tolist():
        if runs and runs[-1][1] == row:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    return [f"{name}[{first}]" if end == first + 1 else f"{name}[{first}:{end}]" for first, end in runs]


def _filled(squares: Tensor, live: Tensor) -> Tensor:
    """The mean of the live ones in place of the others; ones where none is live."""
    return torch.where(live, squares, float(squares[live].mean()) if bool(live.any()) else 1.0)


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
        self.copies = Copies(weights)
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
        self.copies.note(func, args, result)
        return result

    def _name_of(self, operand: Tensor) -> str | None:
        origin = self.copies.origin(operand)
        return None if origin is None else origin[0]

    def _add(self, name: str, operand: Tensor, squares: Tensor, stacked: int = 1) -> None:
        origin = self.copies.origin(operand)
        if origin is not None and origin[1]:  # what lies in a copy is laid where the weight has it
            entries = places_in(self.weights[name], origin[1], Layout.of(operand)).to(squares.device)
            spread = squares.new_zeros(self.weights[name].numel())
            spread.index_add_(0, entries.flatten(), squares.expand(operand.shape).flatten())
            operand, squares, stacked = self.weights[name], spread.view(self.weights[name].shape), 1
        place = (int(operand.storage_offset()), tuple(operand.shape), operand.stride(), stacked)
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
            self._add(name, operand, squares, len(operand) if operand.dim() > 2 else 1)

    def _grouped(self, rows: Tensor, stack: Tensor, ends: Tensor) -> None:
        """Runs of rows, each times a matrix of its own."""
        name = self._name_of(stack)
        if name is None:
            return
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        owners = torch.arange(len(stack), device=rows.device).repeat_interleave(counts)
        wide = rows[: len(owners)].to(self._wide(name))
        sums = wide.new_zeros(len(stack), wide.shape[1]).index_add_(0, owners, wide * wide)
        self._add(name, stack, sums.unsqueeze(-1), len(stack))
