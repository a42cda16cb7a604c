"""Collect the second moments of what every weight reads: the Hessians of its layer's output error.

The model runs, and every convolution and matrix product that a weight takes part in is seen where PyTorch
dispatches it. A parameter comes apart into matrices (inputs, outputs), each with inputs of its own: experts,
the thirds of an attention's projection, groups of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from fxprune.scoring.copies import Copies, Layout, Step, is_repeated, places_in
from fxprune.scoring.inputs import GROUPED, PRODUCTS
from fxprune.torch_private import TorchDispatchMode

__all__ = ["Part", "Products", "Watch", "unfolded"]

aten = torch.ops.aten
CHUNK = 1 << 24
"""Numbers that unfolded windows may have at a time."""


@dataclass(frozen=True)
class Geometry:
    """Say how an operand lies in the storage of its parameter, and how it is read.

    ``inputs_first``: the operand of a product is (inputs, outputs). ``groups``: of a convolution, 0 for a
    product; ``transposed`` for one whose weight is (inputs, outputs / groups, *taps). ``steps``: the copies
    of the parameter that lead to the operand.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    inputs_first: bool = True
    groups: int = 0
    transposed: bool = False
    steps: tuple[Step, ...] = ()

    def positions(self, weight: Tensor) -> Tensor:
        """The places in the flattened parameter, as (parts, inputs, outputs)."""
        found = places_in(weight, self.steps, self._layout)
        if not self.groups:
            matrices = found if found.dim() == 3 else found[None]
            if self.is_shared:
                matrices = matrices[:1]
            return matrices if self.inputs_first else matrices.mT
        apart = found.reshape(self.groups, -1, found.shape[1], self.taps)
        if self.transposed:  # (groups, in, out, taps)
            return apart.permute(0, 1, 3, 2).flatten(1, 2)
        return apart.permute(0, 2, 3, 1).flatten(1, 2)

    @property
    def is_shared(self) -> bool:
        """Whether a stack of matrices is one and the same, or copies of one."""
        if self.groups or len(self.shape) != 3:
            return False
        return self.stride[0] == 0 or is_repeated(self.steps, self._layout)

    @property
    def _layout(self) -> Layout:
        return Layout(self.offset, self.shape, self.stride)

    @property
    def taps(self) -> int:
        """Weights of a kernel, 1 in a product."""
        return math.prod(self.shape[2:]) if self.groups else 1


class Part:
    """One geometry of a parameter, with the moments of its inputs.

    ``moments``: (parts, inputs, inputs), the sum of products of inputs; ``sums``: (1, parts, inputs), their
    sums; ``total``: how many vectors of inputs there were, ``rows``: how many that are not all zero. Where
    the inputs in a dense twin of the network are known, ``cross`` are the products of own inputs and those,
    and ``sums`` has those of both, (2, parts, inputs).
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.moments: Tensor | None = None
        self.cross: Tensor | None = None
        self.sums: Tensor | None = None
        self.rows = 0
        self.total = 0.0

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs of shape (parts, rows, inputs), and what they are in the dense twin."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.moments is None:
            self.moments = wide.new_zeros(len(wide), wide.shape[2], wide.shape[2])
            self.sums = wide.new_zeros(1 if dense is None else 2, len(wide), wide.shape[2])
            self.cross = None if dense is None else torch.zeros_like(self.moments)
        assert self.sums is not None
        self.moments.baddbmm_(wide.mT, wide)
        self.sums[0] += wide.sum(1)
        if dense is not None:
            assert self.cross is not None
            other = dense.to(wide.dtype)
            self.cross.baddbmm_(wide.mT, other)
            self.sums[1] += other.sum(1)
        self.total += wide.shape[1]
        self.rows += int(wide.detach().abs().amax(-1).count_nonzero(-1).amax())


Seen = Callable[[str, Geometry, Callable[[], "list[Tensor]"]], None]


class Products(TorchDispatchMode):
    """Tells ``see`` of every product with one of ``weights``: the name, the geometry, and a function that
    returns the inputs as tensors (parts, rows, inputs)."""

    def __init__(self, weights: Mapping[str, Tensor], see: Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = Copies(weights)
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution.default:
            self._convolution(*args)
        elif func in PRODUCTS:
            first = PRODUCTS[func]
            self._product(args[first], args[first + 1])
        elif func is GROUPED and args[0].dim() == 2 and args[1].dim() == 3:
            self._grouped(*args[:3])
        result = func(*args, **(kwargs or {}))
        self.copies.note(func, args, result)
        return result

    def _product(self, left: Tensor, right: Tensor) -> None:
        for operand, other, inputs_first in ((right, left, True), (left, right.mT, False)):
            origin = self.copies.origin(operand)
            if origin is None:
                continue
            name, steps = origin
            place = (int(operand.storage_offset()), tuple(operand.shape), operand.stride())
            geometry = Geometry(*place, inputs_first=inputs_first, steps=steps)

            def inputs(other: Tensor = other, geometry: Geometry = geometry) -> list[Tensor]:
                x = other if other.dim() == 3 else other[None]
                return [x.flatten(0, 1)[None] if geometry.is_shared else x]

            self.see(name, geometry, inputs)

    def _grouped(self, rows: Tensor, stack: Tensor, ends: Tensor) -> None:
        """Runs of rows, each times a matrix of its own."""
        origin = self.copies.origin(stack)
        if origin is None:
            return
        name, steps = origin
        geometry = Geometry(int(stack.storage_offset()), tuple(stack.shape), stack.stride(), steps=steps)

        def inputs() -> list[Tensor]:
            last = ends.tolist()
            runs = [rows[first:end] for first, end in zip([0, *last], last, strict=False)]
            return [pad_sequence(runs, batch_first=True)]

        self.see(name, geometry, inputs)

    def _convolution(self, x: Tensor, weight: Tensor, bias: Any, *how: Any) -> None:
        origin = self.copies.origin(weight)
        if origin is None:
            return
        name, steps = origin
        stride, padding, dilation, transposed, output_padding, groups = how
        place = (int(weight.storage_offset()), tuple(weight.shape), weight.stride())
        geometry = Geometry(*place, groups=groups, transposed=transposed, steps=steps)
        taps = tuple(weight.shape[2:])

        def inputs() -> list[Tensor]:
            source = x if x.dim() == weight.dim() else x[None]
            size = math.prod(taps) * max(source[0].numel(), 1)
            step = max(1, CHUNK // size)
            return [
                unfolded(part, taps, stride, padding, dilation, groups, transposed, output_padding)
                for part in torch.split(source, step)
            ]

        self.see(name, geometry, inputs)


def unfolded(
    x: Tensor,
    taps: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    transposed: bool = False,
    output_padding: list[int] | None = None,
) -> Tensor:
    """Return what every output position of a convolution reads, as (groups, rows, inputs * taps).

    ``x`` is (samples, inputs, *positions), of any number of axes; the arguments are those of
    ``torch.convolution``. Rows run over samples and positions.

    >>> x = torch.arange(4.0).view(1, 1, 4)
    >>> unfolded(x, (2,), [1], [0], [1])[0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    """
    axes = len(taps)
    stride, padding, dilation = (
        list(one) * axes if len(one) == 1 else list(one) for one in (stride, padding, dilation)
    )
    if transposed:
        x = _stuffed(x, taps, stride, padding, dilation, list(output_padding or [0]) * axes)
        stride = [1] * axes
    else:
        x = pad(x, [width for one in reversed(padding) for width in (one, one)])
    for axis, (size, step, gap) in enumerate(zip(taps, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, gap * (size - 1) + 1, step)[..., ::gap]
    if transposed:
        x = x.flip(tuple(range(-axes, 0)))  # a tap further right reads an input further left
    # (samples, channels, *positions, *taps)
    samples, channels = x.shape[:2]
    x = x.reshape(samples, groups, channels // groups, -1, math.prod(taps))
    return x.permute(1, 0, 3, 2, 4).reshape(groups, -1, channels // groups * math.prod(taps))


def _stuffed(
    x: Tensor,
    taps: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    extra: list[int],
) -> Tensor:
    """The image over which a transposed convolution slides as a plain one: zeros between and around."""
    sizes = [step * (n - 1) + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
    widths = []
    for size, before, gap, more in reversed(list(zip(taps, padding, dilation, extra, strict=False))):
        border = gap * (size - 1) - before
        widths += [border, border + more]
    return pad(wide, widths)


class Watch:
    """Collects the parts of ``weights`` in ``parts``, by name and geometry, while it is entered."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.parts: dict[str, dict[Geometry, Part]] = {name: {} for name in weights}
        self.twin: Iterator[list[Tensor]] | None = None

    def see(self, name: str, geometry: Geometry, inputs: Callable[[], list[Tensor]]) -> None:
        """Add what a product shows, beside what the same product of the twin showed."""
        part = self.parts[name].setdefault(geometry, Part(geometry))
        own = inputs()
        if self.twin is None:
            for x in own:
                part.add(x)
            return
        dense = next(self.twin, [])
        if not _same_rows(own, dense):
            dense = own  # other rows came here, as to an expert: the dense layer is followed on these
        for x, other in zip(own, dense, strict=True):
            part.add(x, other)

    def products(self) -> Products:
        """A mode that shows this watch every product."""
        return Products(self.weights, self.see)


def _same_rows(own: list[Tensor], dense: list[Tensor]) -> bool:
    """Whether two networks gave a product the same rows: as many, and in stacks the same that are empty."""
    if [x.shape for x in own] != [x.shape for x in dense]:
        return False
    pairs = [pair for pair in zip(own, dense, strict=True) if len(pair[0]) > 1]
    return all(torch.equal((x != 0).any(-1), (y != 0).any(-1)) for x, y in pairs)
