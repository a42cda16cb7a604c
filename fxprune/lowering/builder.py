"""Write ops for the op rules: one method per op kind, plus the parameters seen on the way.

In: values and constants. Out: ops appended to the graph under construction and kernel sets recorded for
parameters. Rules never build ops by hand, so liveness and provenance are right by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.params import axes_of_labels, axes_of_whole
from fxprune.graph.tensor_function import TensorFunction
from fxprune.graph.units import Units
from fxprune.lowering.constant import Constant
from fxprune.lowering.matrix_axes import matrix_axes, merged_axes
from fxprune.lowering.parameters import Parameters
from fxprune.lowering.reads import Reads, joined
from fxprune.lowering.spaces import Spaces, space_name
from fxprune.lowering.taps import live_taps

__all__ = ["Builder"]


class Builder:
    """Appends ops, each with the ``node``, ``inner`` and ``layer`` being lowered, see :class:`ir.Op`."""

    def __init__(self, parameters: Parameters, rules: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        self.rules = rules or {}  # the user's own
        self.ops: list[ir.AnyOp] = []
        self.parameters = parameters
        self.kernels: dict[str, ir.KernelSet] = {}
        self.units: dict[Units, None] = {}
        self.in_training: dict[int, ir.Value] = {}  # see `ChannelGraph`
        self.node = self.inner = self.layer = ""
        self.samples, self.strict = 1, False
        self.leaves: dict[Any, Any] = {}  # traces of leaves by form, see `capture_leaf`
        # Per value: the part of each axis that is data, where an op before has padded it with zeros.
        self.data_range: dict[int, dict[int, tuple[int, int]]] = {}
        # What later rules need to know of a value: a square; a mean of which over which axes; pairs at -inf.
        self.squares: set[int] = set()
        self.mean_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.blocked: dict[int, Tensor] = {}
        self.picked: dict[int, Any] = {}  # see `rules.picked`
        # By id of a constant that a node of the captured graph yields: that node; its value as an operand.
        self.constant_nodes: dict[int, str] = {}
        self.sources: dict[int, ir.Value] = {}
        self._spaces = Spaces()
        self._count = 0

    def state(self) -> tuple[Any, ...]:
        """Note how far the graph is, for :meth:`restore`."""
        return len(self.ops), dict(self.kernels), dict(self.units), dict(self.sources), self.node, self.inner

    def restore(self, state: tuple[Any, ...]) -> None:
        """Take back what a rule wrote before it failed."""
        count, self.kernels, self.units, self.sources, self.node, self.inner = state
        del self.ops[count:]

    # -- values ---------------------------------------------------------------------------------------------
    def value(self, shape: Sequence[int], live: bool) -> ir.Value:
        self._count += 1
        return ir.Value(self._count - 1, tuple(int(s) for s in shape), live)

    def _emit(
        self, kind: type[ir.AnyOp], inputs: Sequence[ir.Value], shape: Sequence[int], **fields: Any
    ) -> ir.Value:
        live = any(value.live for value in inputs) or (kind is ir.Source and fields.pop("live"))
        output = self.value(shape, live)
        self.ops.append(kind(output, tuple(inputs), self.node, self.layer, self.inner, **fields))
        self._spaces.follow(self.ops[-1])
        return output

    def source(self, shape: Sequence[int], *, live: bool = True, pattern: Tensor | None = None) -> ir.Value:
        return self._emit(ir.Source, (), shape, live=live, pattern=pattern)

    def materialise(self, x: ir.Value | Constant, *, exact: bool = False) -> ir.Value:
        """A constant as a value, on no path: present everywhere, or nowhere if it is made of zeros.

        ``exact`` keeps the zeros of a tensor made in the forward: in a contraction it is a matrix that
        selects.
        """
        if isinstance(x, ir.Value):
            return x
        numbers = None if x.weight is not None or x.is_learnt else x.numbers()
        if numbers is None:
            pattern = torch.zeros(x.shape, dtype=torch.bool) if x.zero else None
        elif exact:
            pattern = None if bool((numbers != 0).all()) else numbers != 0
        else:
            pattern = None if bool((numbers != 0).any()) else torch.zeros(x.shape, dtype=torch.bool)
        if id(x) not in self.constant_nodes:
            value = self.source(x.shape, live=False, pattern=pattern)
            self.read(value, x)
            return value
        reader = self.node, self.inner
        self.node, self.inner = self.constant_nodes[id(x)], ""
        value = self.source(x.shape, live=False, pattern=pattern)
        self.read(value, x)
        self.node, self.inner = reader
        self.sources.setdefault(id(x), value)
        return value

    # -- ops ------------------------------------------------------------------------------------------------
    def sum(self, inputs: Sequence[ir.Value], shape: Sequence[int]) -> ir.Value:
        return self._emit(ir.Sum, inputs, shape)

    def gate(self, a: ir.Value, b: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self._emit(ir.Gate, (a, b), shape)

    def mix(
        self,
        equation: str,
        a: ir.Value,
        b: ir.Value,
        shape: Sequence[int],
        product: TensorFunction | None = None,
    ) -> ir.Value:
        return self._emit(ir.Mix, (a, b), shape, equation=equation, product=product)

    def select(self, x: ir.Value, pattern: Tensor, shape: Sequence[int]) -> ir.Value:
        """``x`` where ``pattern`` (bool) holds, Zero elsewhere."""
        return self.gate(x, self.source(pattern.shape, live=False, pattern=pattern), shape)

    def affine(
        self,
        x: ir.Value,
        shape: Sequence[int] | None = None,
        *,
        bias: bool = False,
        by: Constant | None = None,
    ) -> ir.Value:
        """Scale by a constant, or add one if ``bias``, broadcast to ``shape``; no op where nothing changes.

        ``by`` is the constant: its parameters are noted.
        """
        shape = x.shape if shape is None else tuple(shape)
        reads = by is not None and by.reads is not None
        if not bias and shape == x.shape and not reads:
            return x
        output = self._keep_range(x, self._emit(ir.Affine, (x,), shape, bias=bias))
        self.read(output, by)
        return output

    def norm(
        self,
        x: ir.Value,
        axes: Sequence[int],
        shape: Sequence[int] | None = None,
        *,
        groups: int = 1,
        bias: bool = False,
        eps: float | None = None,
    ) -> ir.Value:
        shape = x.shape if shape is None else tuple(shape)
        fields = {"axes": _axes(axes, x), "groups": groups, "bias": bias, "eps": eps}
        return self._keep_range(x, self._emit(ir.Norm, (x,), shape, **fields))

    def map(self, x: ir.Value, *, floor: bool = False, axes: Sequence[int] = ()) -> ir.Value:
        """An elementwise function, or with ``axes`` a softmax; no op for one that gives Zero for Zero."""
        if not floor and not axes:
            return x
        return self._keep_range(x, self._emit(ir.Map, (x,), x.shape, floor=floor, axes=_axes(axes, x)))

    def map_anew(self, x: ir.Value, *, floor: bool = False) -> ir.Value:
        """``x`` again, as a value of its own, so that something can be said of it alone."""
        return self._keep_range(x, self._emit(ir.Map, (x,), x.shape, floor=floor))

    def gather(
        self,
        move: TensorFunction,
        inputs: Sequence[ir.Value],
        shape: Sequence[int],
        pads: dict[int, tuple[int, int]] | None = None,
        literals: tuple[ir.SizeLiteral, ...] = (),
    ) -> ir.Value:
        sides = tuple((dim, *pair) for dim, pair in (pads or {}).items())
        output = self._emit(ir.Gather, inputs, shape, move=move, pads=sides, literals=literals)
        if pads:
            size = output.shape
            self.data_range[output.index] = {d: (lo, size[d] - hi) for d, (lo, hi) in pads.items()}
        return output

    def reduce(
        self, x: ir.Value, how: str, dims: Sequence[int], keepdim: bool, shape: Sequence[int], **kind: str
    ) -> ir.Value:
        return self._emit(ir.Pool, (x,), shape, how=how, dims=_axes(dims, x), keepdim=keepdim, **kind)

    def pool(
        self, x: ir.Value, how: str, dims: Sequence[int], window: ir.WindowPool, shape: Sequence[int]
    ) -> ir.Value:
        return self._emit(ir.Pool, (x,), shape, how=how, dims=_axes(dims, x), keepdim=True, window=window)

    def opaque(self, inputs: Sequence[ir.Value], shape: Sequence[int], reason: str) -> ir.Value:
        return self._emit(ir.Opaque, inputs, shape, reason=reason)

    # -- parameters -----------------------------------------------------------------------------------------
    def read(
        self,
        value: ir.Value,
        operand: Any,
        places: Sequence[tuple[int, int] | None] | None = None,
        groups: int = 1,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Note that the op emitted last, which makes ``value``, reads the parameters in an operand.

        Args:
            value: the op's output.
            operand: a constant, or a parameter or buffer of a module; anything else has no parameters.
            places: along which axis of which value every axis of the operand runs; by default, as in
                broadcasting, the last axes of ``value``.
            groups: of a grouped convolution.
            sizes: of the axes in ``places``, where the operand repeats along them.
        """
        reads = self.reads_of(operand)
        if reads is None:
            return
        if places is None:
            first = len(value.shape) - len(operand.shape)
            places = [(value.index, first + axis) for axis in range(len(operand.shape))]
        uses = []
        for name in reads.names:
            shape = self.parameters.shapes[name]
            if reads.whole:
                found = axes_of_whole(shape, places, sizes)
            else:
                labels = reads.labels().get(name)
                if labels is not None and sizes is not None:
                    labels = labels.tile([full // n for full, n in zip(sizes, labels.shape, strict=True)])
                unknown = (None,) * len(shape)
                found = unknown if labels is None else axes_of_labels(labels, shape, places)
            uses.append(ir.ParamUse(name, found, groups, name not in self.parameters.owners))
        assert self.ops[-1].output.index == value.index
        self.ops[-1] = replace(self.ops[-1], params=(*self.ops[-1].params, *uses))

    def reads_of(self, operand: Any) -> Reads | None:
        """The parameters in a constant, or in a parameter or buffer of a module."""
        if isinstance(operand, Tensor):
            name = self.parameters.all_names.get(id(operand))
            return None if name is None else Reads.of(name, operand.shape)
        return operand.reads if isinstance(operand, Constant) else None

    def part(self, operand: Any, view: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Constant | None:
        """A part of a constant, or of a parameter of a module, as a constant that knows its parameters."""
        if operand is None:
            return None
        reads = self.reads_of(operand)
        own = None if reads is None else joined([reads], lambda _, labels: view(labels))
        return Constant(tuple(shape), torch.float32, lambda: torch.ones(tuple(shape)), reads=own)

    def _read_weight(
        self, x: ir.Value, output: ir.Value, weight: ir.WeightRef, by: Any, *, rank: int, groups: int
    ) -> None:
        """Note the axes of a contraction's weight, or of what it was made of (``by``), with ``rank`` taps."""
        axis = len(output.shape) - rank - 1
        sides = [(output, axis), (x, axis)]
        if self._is_transposed():
            sides.reverse()
        places = [*[(value.index, axis) for value, axis in sides], *[None] * rank]
        sizes = [*[value.shape[axis] for value, axis in sides], *weight.shape[2:]]
        if weight.name is not None:
            reads = Reads.of(weight.name, self.parameters.shapes[weight.name])
            if weight.view is not None:
                reads = joined([reads], lambda _, own: weight.operand(lambda _: own.double()).long())
            operand = Constant(weight.shape, torch.float32, lambda: None, reads=reads)
            self.read(output, operand, places, groups=groups, sizes=sizes)
        known = {use.name for use in self.ops[-1].params}
        others = self.reads_of(by)
        if others is not None and not set(others.names) <= known:
            rest = replace(others, names=tuple(name for name in others.names if name not in known))
            operand = Constant(weight.shape, torch.float32, lambda: None, reads=rest)
            self.read(output, operand, places, groups=groups, sizes=sizes)

    def _is_transposed(self) -> bool:
        op = self.ops[-1]
        return isinstance(op, ir.Kernel) and op.window is not None and op.window.transposed

    # -- kernels --------------------------------------------------------------------------------------------
    def linear(
        self,
        x: ir.Value,
        weight: ir.WeightRef,
        *,
        bias: Any,
        by: Any = None,
        weights: int | None = None,
    ) -> ir.Value:
        """Contract the last axis with an operand of shape ``(out, in)``.

        ``bias`` is an operand or ``None``; ``by`` is what the weight was made of, if it is not one parameter;
        ``weights`` is the number of weights that each position is multiplied with, if not all of the operand.
        """
        shape = (*x.shape[:-1], weight.shape[0])
        positions = self._per_sample(x, torch.Size(shape[:-1]).numel())
        taps = torch.ones((), dtype=torch.bool)
        macs = positions * (torch.Size(weight.shape).numel() if weights is None else weights)
        output = self._emit(ir.Kernel, (x,), shape, weight=weight, bias=bias is not None, macs=macs)
        self._read_weight(x, output, weight, by, rank=0, groups=1)
        self.read(output, bias)
        self._record(weight, x, output, macs, taps, 1)
        return output

    def conv(
        self,
        x: ir.Value,
        weight: ir.WeightRef,
        shape: Sequence[int],
        *,
        window: ir.Window,
        groups: int,
        bias: Any,
        by: Any = None,
    ) -> ir.Value:
        rank = len(window.kernel)
        places = x.shape[-rank:] if window.transposed else tuple(shape)[-rank:]
        images = x.shape[0] if len(x.shape) == rank + 2 else 1
        positions = self._per_sample(x, images) * torch.Size(places).numel()
        macs = positions * torch.Size(weight.shape).numel()
        taps = live_taps(window, x.shape[-rank:], tuple(shape)[-rank:], self._ranges(x, rank))
        output = self._emit(
            ir.Kernel,
            (x,),
            shape,
            weight=weight,
            bias=bias is not None,
            groups=groups,
            window=window,
            live_taps=None if bool(taps.all()) else taps,
            macs=macs,
        )
        self._read_weight(x, output, weight, by, rank=rank, groups=groups)
        self.read(output, bias, [(output.index, len(shape) - rank - 1)])
        self._record(weight, x, output, macs, taps, groups)
        return output

    def _per_sample(self, x: ir.Value, count: int) -> int:
        """Count those of ``count`` rows that are one sample's; a constant is there once for all."""
        return max(1, count // self.samples) if x.live else count

    def _record(
        self,
        weight: ir.WeightRef,
        x: ir.Value,
        output: ir.Value,
        macs: int,
        taps: Tensor,
        groups: int,
    ) -> None:
        name = weight.name
        if name is None:
            return
        shape, transposed = self.parameters.tensors[name].shape, self._is_transposed()
        axis, old = len(output.shape) - taps.dim() - 1, self.kernels.get(name)
        axes = merged_axes(old, matrix_axes(shape, weight, transposed=transposed) if groups == 1 else None)
        if axes is not None:  # they tell rows and columns, however the operand has them
            transposed, taps = False, torch.ones((), dtype=torch.bool)
        into, out = (0, 1) if transposed else (1, 0)
        space = ir.Space(space_name(name), shape[out] * (groups if transposed else 1))
        if weight.view is None:
            self._spaces.begin(output, space.name, axis)
        if old is not None and old.live_taps.shape == taps.shape:
            taps = taps | old.live_taps
        names = [] if old is None else old.in_space.name.split("+")
        names = list(dict.fromkeys([*names, self._spaces.name_of(x, axis)]))  # uses may read different layers
        self.kernels[name] = ir.KernelSet(
            name=name,
            shape=shape,
            in_space=ir.Space("+".join(names), shape[into] * (1 if transposed else groups)),
            out_space=space,
            live_taps=taps,
            groups=groups,
            owner=self.parameters.owners[name][0],
            uses=1 if old is None else old.uses + 1,
            macs=macs + (0 if old is None else old.macs),
            transposed=transposed,
            direct=weight.direct or (old is not None and old.direct),
            aliases=tuple(self.parameters.aliases[name]),
            axes=axes,
        )

    def _ranges(self, x: ir.Value, rank: int) -> list[tuple[int, int]]:
        known = self.data_range.get(x.index, {})
        first = len(x.shape) - rank
        return [known.get(first + d, (0, x.shape[first + d])) for d in range(rank)]

    def _keep_range(self, x: ir.Value, output: ir.Value) -> ir.Value:
        if x.index in self.data_range and x.shape == output.shape:
            self.data_range[output.index] = self.data_range[x.index]
        return output


def _axes(axes: Sequence[int], x: ir.Value) -> tuple[int, ...]:
    return tuple(sorted({axis % len(x.shape) for axis in axes})) if x.shape else ()
