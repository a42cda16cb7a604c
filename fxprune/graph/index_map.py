"""Index maps: which entry of the inputs every entry of a movement's output copies.

A map is found by running the movement on labels, and kept in a compact form wherever it has one: for each
input the output positions that read it, and every input coordinate as a sum of one number per output axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.graph.tensor_function import TensorFunction, same

__all__ = ["CONSTANT", "ZERO", "Coordinate", "IndexMap", "InputPart", "find_index_map"]

ZERO, CONSTANT = -1, -2
"""Flat indices of entries that copy nothing: filled with zero, filled with another number."""

LISTED = 8
"""Numbers up to which an irregular coordinate is printed in full."""


@dataclass(frozen=True)
class Coordinate:
    """The coordinate along one input axis: ``start`` plus one number per output axis in ``terms``.

    ``terms`` holds pairs of an output axis and an int64 tensor with a number for each position of it that the
    part covers.
    """

    start: int
    terms: tuple[tuple[int, Tensor], ...] = ()


@dataclass(frozen=True)
class InputPart:
    """The output entries that copy from ``input``: all those whose coordinates are in ``positions``.

    ``positions`` has an int64 tensor per output axis, ``axes`` a :class:`Coordinate` per input axis.
    """

    input: int
    positions: tuple[Tensor, ...]
    axes: tuple[Coordinate, ...]


@dataclass(frozen=True, eq=False)
class IndexMap:
    """For every output entry the input entry that it copies.

    Either ``parts`` describes the map axis by axis, entries outside of all parts being filled with ``fill``;
    or ``flat`` (int64, of the output's shape) holds indices into the concatenated flat inputs, where ``ZERO``
    and ``CONSTANT`` stand for filled entries.

    >>> from fxprune.graph.tensor_function import PREVIOUS
    >>> flat = find_index_map(TensorFunction.of(torch.flatten, PREVIOUS, 1), [(2, 3, 4)], (2, 12))
    >>> print(flat)
    x0[o0, o1 // 4, o1 % 4]
    >>> flat.along(0, 1)
    (1, tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]))
    """

    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    parts: tuple[InputPart, ...] = ()
    flat: Tensor | None = None
    fill: int = ZERO
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexMap) and same(self, other)

    def flat_index(self) -> Tensor:
        """Return the map as indices into the concatenated flat inputs, int64, of the output's shape."""
        if self.flat is not None:
            return self.flat
        index = torch.full(self.output_shape, self.fill, dtype=torch.int64)
        offsets = _offsets(self.input_shapes)
        for part in self.parts:
            total = torch.full([len(p) for p in part.positions], offsets[part.input], dtype=torch.int64)
            for axis, stride in zip(part.axes, _strides(self.input_shapes[part.input]), strict=True):
                total += axis.start * stride
                for out_axis, numbers in axis.terms:
                    view = [1] * total.dim()
                    view[out_axis] = -1
                    total += numbers.view(view) * stride
            index[_grid(part.positions)] = total
        return index

    def apply(self, *tensors: Tensor, constant: float = 1.0) -> Tensor:
        """Copy the entries of ``tensors``; ``constant`` fills in where the movement fills with a number."""
        filled = tensors[0].new_tensor([0, constant])
        entries = torch.cat([filled, *(x.reshape(-1) for x in tensors)])
        index = self.flat_index()
        place = torch.where(index == ZERO, 0, torch.where(index == CONSTANT, 1, index + 2))
        return entries[place.to(entries.device)]

    def along(self, input: int, axis: int) -> tuple[int, Tensor] | None:
        """Return the output axis that runs along an axis of an input, and the input position of each entry.

        Returns:
            The output axis and an int64 tensor of its size, -1 where an entry comes from elsewhere; ``None``
            where several output axes, none, or a flat map decide.
        """
        for part in self.parts:
            terms = part.axes[axis].terms if part.input == input else ()
            if len(terms) == 1:
                out_axis, numbers = terms[0]
                found = torch.full((self.output_shape[out_axis],), -1, dtype=torch.int64)
                found[part.positions[out_axis]] = numbers + part.axes[axis].start
                return out_axis, found
        return None

    def __str__(self) -> str:
        if self.flat is not None:
            return f"flat map of {self.flat.numel()} entries"
        names = {ZERO: "0", CONSTANT: "constant"}
        texts = [_part_text(part, self.output_shape) for part in self.parts]
        covered = sum(math.prod(len(p) for p in part.positions) for part in self.parts)
        if covered < math.prod(self.output_shape):
            texts.append(f"{names[self.fill]} elsewhere")
        return "; ".join(texts)


# -- finding -----------------------------------------------------------------------------------------
def find_index_map(
    move: TensorFunction, input_shapes: Sequence[tuple[int, ...]], output_shape: tuple[int, ...]
) -> IndexMap:
    """Run ``move`` on labels, and describe where each label went.

    Labels are exact in float64, which every movement takes; 0 and 1 are those of filled-in entries.
    """
    shapes = tuple(tuple(shape) for shape in input_shapes)
    found = _moved_labels(move, shapes, 2) - 2
    flat = torch.where(found == -2, ZERO, torch.where(found == -1, CONSTANT, found))
    if move.holds_tensors:  # numbers of its own look like labels, but stay when the labels change
        own = _moved_labels(move, shapes, 3) - 2 == found
        flat = torch.where(own & (found != -2), CONSTANT, flat)
    parts = []
    for i, (shape, offset) in enumerate(zip(shapes, _offsets(shapes), strict=True)):
        inside = (flat >= offset) & (flat < offset + math.prod(shape))
        part = _part(i, shape, flat - offset, inside) if bool(inside.any()) else None
        if part is not None:
            parts.append(part)
        elif bool(inside.any()):
            return IndexMap(shapes, output_shape, flat=flat)
    fills = [fill for fill in (ZERO, CONSTANT) if bool((flat == fill).any())]
    if len(fills) > 1:
        return IndexMap(shapes, output_shape, flat=flat)
    return IndexMap(shapes, output_shape, tuple(parts), fill=fills[0] if fills else ZERO)


def _moved_labels(move: TensorFunction, shapes: tuple[tuple[int, ...], ...], first: int) -> Tensor:
    """Run ``move`` on the numbers from ``first`` on."""
    labels = [
        (torch.arange(math.prod(shape), dtype=torch.float64) + offset + first).reshape(shape)
        for shape, offset in zip(shapes, _offsets(shapes), strict=True)
    ]
    moved: Tensor = move(*labels)
    return moved.long()


def _part(i: int, shape: tuple[int, ...], flat: Tensor, inside: Tensor) -> InputPart | None:
    """The entries ``inside`` as a part, if they form a grid and coordinates are sums over its axes."""
    dims = range(flat.dim())
    positions = tuple(_any_but(inside, dim).nonzero().flatten() for dim in dims)
    if int(inside.sum()) != math.prod(len(p) for p in positions):
        return None
    block = flat[_grid(positions)] if positions else flat
    axes = []
    for size, stride in zip(shape, _strides(shape), strict=True):
        coordinate = block // stride % size
        start = int(coordinate.flatten()[0])
        terms, total = [], torch.full((), start)
        for dim in dims:
            line = coordinate[tuple(slice(None) if d == dim else 0 for d in dims)] - start
            if bool(line.any()):
                terms.append((dim, line.clone()))
                total = total + line.view([-1 if d == dim else 1 for d in dims])
        if not bool((coordinate == total).all()):
            return None
        axes.append(Coordinate(start, tuple(terms)))
    return InputPart(i, positions, tuple(axes))


def _any_but(inside: Tensor, dim: int) -> Tensor:
    others = [d for d in range(inside.dim()) if d != dim]
    return inside.any(others) if others else inside


def _grid(positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Indices that pick the product of positions along every axis."""
    rank = len(positions)
    return tuple(p.view([-1 if d == dim else 1 for d in range(rank)]) for dim, p in enumerate(positions))


def _offsets(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    sizes = [math.prod(shape) for shape in shapes]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


# -- text --------------------------------------------------------------------------------------------
def _part_text(part: InputPart, output: Sequence[int]) -> str:
    axes = [_coordinate_text(axis, part.positions) for axis in part.axes]
    where = [
        f"o{dim} in {_range_text(p)}"
        for dim, (p, size) in enumerate(zip(part.positions, output, strict=True))
        if len(p) < size
    ]
    return f"x{part.input}[{', '.join(axes)}]" + (f" for {' and '.join(where)}" if where else "")


def _coordinate_text(axis: Coordinate, positions: Sequence[Tensor]) -> str:
    if not axis.terms:
        return str(axis.start)
    if len(axis.terms) == 1:
        out_axis, numbers = axis.terms[0]
        return _term_text(out_axis, numbers + axis.start, positions[out_axis])
    texts = [_term_text(out_axis, numbers, positions[out_axis]) for out_axis, numbers in axis.terms]
    return " + ".join([*([str(axis.start)] if axis.start else []), *texts])


def _term_text(out_axis: int, numbers: Tensor, positions: Tensor) -> str:
    """Numbers along an output axis as ``3 * o1 + 2`` or ``o1 // 4 % 3``, else as a list."""
    name = f"o{out_axis}"
    first, last = int(positions[0]), int(positions[-1])
    slope = (int(numbers[-1]) - int(numbers[0])) // max(1, last - first)
    base = int(numbers[0]) - slope * first
    if slope and torch.equal(numbers, slope * positions + base):
        text = name if slope == 1 else f"-{name}" if slope == -1 else f"{slope} * {name}"
        return text + (f" + {base}" if base > 0 else f" - {-base}" if base < 0 else "")
    run = int((numbers == numbers[0]).long().cumprod(0).sum())
    step = int(numbers[run]) - int(numbers[0]) if run < len(numbers) else 0
    if step > 0:
        quotient, text = (positions, name) if run == 1 else (positions // run, f"{name} // {run}")
        period = int(numbers.max()) // step + 1
        for found, spelled in ((quotient, text), (quotient % period, f"{text} % {period}")):
            if torch.equal(numbers, step * found):
                return spelled if step == 1 else f"{step} * ({spelled})"
    return str(numbers.tolist()) if len(numbers) <= LISTED else f"<{len(numbers)} numbers>[{name}]"


def _range_text(positions: Tensor) -> str:
    first, last = int(positions[0]), int(positions[-1])
    if len(positions) == 1:
        return f"[{first}]"
    step = int(positions[1]) - first
    if torch.equal(positions, torch.arange(first, last + 1, step)):
        return f"{first}:{last + 1}" + (f":{step}" if step != 1 else "")
    return str(positions.tolist()) if len(positions) <= LISTED else f"<{len(positions)} positions>"
