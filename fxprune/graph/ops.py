"""The ops of the typed channel/kernel dataflow graph: a small closed set of kinds over values.

In: nothing; these are plain data, out of which a ChannelGraph is made. A value is a tensor of the captured
network; an op says how paths, not numbers, go through it:

=========  ==========================================================================================
Source     the network's input (live), or a constant (class token, table): present, but no path
Kernel     contraction with a parameter: conv and linear of every rank, one kernel per (out, in) pair
Sum        paths add: residual connections
Gate       elementwise product of two values: paths through either, where the other is not Zero
Gather     data movement (reshape, concat, split, shuffle, pad): an index map
Mix        contraction of two values: attention scores, attention-weighted values
Pool       paths meet along positions (or any axis): average, maximum, reduction, resampling
Norm       division by a statistic of the value itself: paths pass; names the axes of the statistic
Affine     bias, scale by a constant: paths pass; with a bias the value is never Zero again
Map        elementwise function: paths pass; with a floor (f(0) != 0) the value is never Zero again
Opaque     unknown: every input entry reaches every output entry
Sink       the outputs
=========  ==========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxprune.graph.index_map import IndexMap, find_index_map
from fxprune.graph.literals import SizeLiteral
from fxprune.graph.params import AxisUse, ParamUse
from fxprune.graph.tensor_function import TensorFunction, same

__all__ = [
    "Affine",
    "AnyOp",
    "AxisUse",
    "ConstantValue",
    "Gate",
    "Gather",
    "Kernel",
    "KernelSet",
    "LinearOp",
    "Map",
    "Mix",
    "Norm",
    "Op",
    "Opaque",
    "ParamUse",
    "Pool",
    "Sink",
    "SizeLiteral",
    "Source",
    "Space",
    "Sum",
    "Value",
    "WeightRef",
    "Window",
    "WindowPool",
    "refuse_kind",
]


@dataclass(frozen=True)
class Value:
    """One tensor: ``shape`` as captured, and whether any path from the input can reach it (``live``)."""

    index: int
    shape: tuple[int, ...]
    live: bool


@dataclass(frozen=True)
class Space:
    """A channel space: the index set of one side of a kernel set.

    It is named after the layer whose output channels it holds, in their order. Where these are changed or
    mixed with others (by a concat, a flatten, a sum of two layers), or come from the network's input, it is
    named after the value that a layer reads, ``%7``, and ``ChannelGraph.input_channels`` says what they come
    from. Names of the several uses of one parameter are joined by ``+``.
    """

    name: str
    size: int


@dataclass(frozen=True, eq=False)
class KernelSet:
    """The kernels of one prunable parameter.

    ``shape`` is the parameter's, ``(out, in / groups, *taps)``; entry ``[o, i]`` is one kernel, its taps the
    weights in it. ``live_taps`` (bool, of the taps' shape) marks the taps that see anything but padding.
    ``uses`` counts the places where the parameter is applied (tied weights, modules called twice), ``macs``
    the multiply-adds of all of them together for one sample of the dense network, taps on padding included.

    ``axes``: of a parameter that is no matrix by itself, such as ``(features, heads, width)`` or the weights
    of several experts, the axes that run along its outputs and those along its inputs; others are taps.
    ``None``: the first two.
    """

    name: str
    shape: torch.Size
    in_space: Space
    out_space: Space
    live_taps: Tensor
    groups: int
    owner: str
    uses: int
    macs: int
    transposed: bool = False
    direct: bool = False
    aliases: tuple[str, ...] = ()
    axes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __eq__(self, other: object) -> bool:
        return type(other) is KernelSet and same(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def out_axis(self) -> int:
        """The parameter's axis that runs over output channels (0, or 1 for a transposed convolution)."""
        return 1 if self.transposed else 0

    @property
    def outputs(self) -> int:
        """The number of output channels, as ``axes`` has them."""
        return (
            self.out_space.size if self.axes is None else math.prod(self.shape[axis] for axis in self.axes[0])
        )

    @property
    def inputs(self) -> int:
        """The number of input channels, as ``axes`` has them."""
        return (
            self.in_space.size if self.axes is None else math.prod(self.shape[axis] for axis in self.axes[1])
        )

    def by_axes(self, tensor: Tensor) -> Tensor:
        """Turn a tensor of the parameter's shape to (outputs, inputs, taps), as ``axes`` has them."""
        if self.axes is None:
            return tensor
        first = (*self.axes[0], *self.axes[1])
        rest = [axis for axis in range(tensor.dim()) if axis not in first]
        return tensor.permute([*first, *rest]).reshape(self.outputs, self.inputs, -1)


@dataclass(frozen=True)
class WeightRef:
    """The weight operand of a contraction: ``view`` of parameter ``name`` (``None``: no prunable parameter).

    ``direct`` says that some other module than the parameter's owner reads it; ``computed``, that the operand
    is a function of the parameter in its shape (a standardised weight), in which zeros need not stay zeros;
    ``scaled``, that this function multiplies each entry by one of a buffer or of a number, so that zeros stay
    zeros, and the rest stays the same where some entries are cut.
    """

    name: str | None
    shape: tuple[int, ...]
    view: TensorFunction | None = None
    direct: bool = False
    computed: bool = False
    scaled: bool = False

    def operand(self, weights: Callable[[str], Tensor]) -> Tensor:
        weight = torch.ones(self.shape) if self.name is None else weights(self.name)
        if self.view is None:
            return weight
        operand: Tensor = self.view(weight)
        return operand


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution over the last ``len(kernel)`` axes; ``padding`` gives (before, after) per
    axis.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def is_pointwise(self) -> bool:
        """No position mixes with another: taps of size one and no padding."""
        return all(k == 1 for k in self.kernel) and all(p == (0, 0) for p in self.padding)

    @property
    def keeps_positions(self) -> bool:
        """Every position goes to the one at the same place."""
        return self.is_pointwise and all(s == 1 for s in self.stride) and not any(self.output_padding)


@dataclass(frozen=True)
class WindowPool:
    """A pooling window: ``own`` is the network's operation, ``total`` the sum over the same windows,
    ``periodic`` that sum on a periodic image, where it differs. All work on the last axes of a tensor of any
    rank."""

    own: TensorFunction
    total: TensorFunction
    periodic: TensorFunction | None = None
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """Fields that every op has: its values, and the fx node and the layer that it came from.

    ``node`` is the name of a node in the graph that ``capture`` returned. An op from the inside of a leaf has
    the leaf's node there, and in ``inner`` the names of the nodes of the leaf's own graph, joined by dots.
    ``params`` lists the parameters and buffers that the op reads.
    Several ops may share one node; ``ChannelGraph.value_of`` says which value the node yields.
    """

    output: Value
    inputs: tuple[Value, ...]
    node: str
    layer: str
    inner: str = ""
    params: tuple[ParamUse, ...] = ()

    @property
    def kind(self) -> str:
        return type(self).__name__

    def __eq__(self, other: object) -> bool:
        """Compare by content, tensors by their numbers."""
        return isinstance(other, Op) and same(self, other)

    def __hash__(self) -> int:
        return hash((self.kind, self.output))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from the fields."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True)
class ConstantValue:
    """A tensor of the network that does not depend on its input and that no op reads as a value.

    ``node`` is the first node that yields it: a ``get_attr``, or a function of constants.
    """

    value: Value
    node: str
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Source(Op):
    """``pattern`` says where a constant is not Zero (bool, of the value's shape); ``None``: everywhere."""

    pattern: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kernel(Op):
    """A convolution or a linear map; ``macs`` counts the multiply-adds for one sample, padding included."""

    weight: WeightRef = field(default_factory=lambda: WeightRef(None, ()))
    bias: bool = False
    groups: int = 1
    window: Window | None = None
    live_taps: Tensor | None = None
    macs: int = 0


@dataclass(frozen=True, eq=False)
class Sum(Op):
    pass


@dataclass(frozen=True, eq=False)
class Gate(Op):
    pass


@dataclass(frozen=True, eq=False)
class Gather(Op):
    """``move`` maps the input tensors to the output tensor by copying entries (zeros may be filled in).

    ``pads`` lists ``(axis, before, after)`` where image axes grow by zeros on their borders: a periodic image
    grows by itself there. ``literals`` are the numbers among the node's arguments that depend on sizes.
    """

    move: TensorFunction = field(default_factory=TensorFunction)
    pads: tuple[tuple[int, int, int], ...] = ()
    literals: tuple[SizeLiteral, ...] = ()

    def index_map(self) -> IndexMap:
        """Return which input entry every output entry copies; found at the first call, and kept."""
        return self._index_map

    @cached_property
    def _index_map(self) -> IndexMap:
        return find_index_map(self.move, [value.shape for value in self.inputs], self.output.shape)


@dataclass(frozen=True, eq=False)
class Mix(Op):
    """``einsum(equation, a, b)`` of two values, or any other bilinear ``product`` of the full tensors."""

    equation: str = ""
    product: TensorFunction | None = None


@dataclass(frozen=True, eq=False)
class Pool(Op):
    """Windows (``window``) or whole axes (``dims``, kept as size one if ``keepdim``) pooled by ``how``.

    ``how`` is "mean", "sum", or "max" for all that picks among entries; ``extreme`` is "largest" or
    "smallest" where that entry is the result, and it does not matter where it stood.
    """

    how: str = "mean"
    dims: tuple[int, ...] = ()
    keepdim: bool = False
    window: WindowPool | None = None
    extreme: str = ""


@dataclass(frozen=True, eq=False)
class Affine(Op):
    bias: bool = False


@dataclass(frozen=True, eq=False)
class Norm(Op):
    """``(x - mean) / std * scale + bias``, or a part of it, as evaluation computes it.

    ``axes`` are those of the input along which entries share their statistic: dropping an entry of such an
    axis changes the others. A BatchNorm with running statistics has none; with ``groups`` > 1 axis 1 is split
    into so many parts with a statistic each. ``eps`` is ``None`` where it is not known. ``held`` are those of
    the axes along which no entry can be dropped, as no norm is known that makes up for it.
    """

    axes: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    eps: float | None = None
    held: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Map(Op):
    """An elementwise function; a softmax is one as well, and ``axes`` are those it sums along."""

    floor: bool = False
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Opaque(Op):
    """``reason`` says what no rule knew."""

    reason: str = ""


@dataclass(frozen=True, eq=False)
class Sink(Op):
    pass


LinearOp = Kernel | Sum | Gather | Pool | Norm | Affine | Map | Opaque
"""The kinds that paths go through as through a linear function of all inputs together."""

AnyOp = Source | LinearOp | Gate | Mix | Sink
"""Every kind. Consumers match on it, and end with ``case _: refuse_kind(op)``."""


def refuse_kind(op: NoReturn) -> NoReturn:
    """Raise a TypeError that names the kind and the node of ``op``.

    For the end of a ``match`` over all kinds: mypy accepts the call only where no kind is left.
    """
    raise TypeError(_refusal(op))


def _refusal(op: Op) -> str:
    name = getattr(op, "node", None)
    return f"op kind {type(op).__name__} (node {name!r}) is not one that this pass knows"
