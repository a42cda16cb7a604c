"""Trace the input channels of kernels back to the layers, and to the network's inputs, that make them.

In: ops and kernel sets. Out: for every input channel the channels that reach it along paths without another
kernel set in between; through a residual sum, say, the channels of several layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fxprune.graph.ops import (
    Affine,
    AnyOp,
    Gate,
    Gather,
    Kernel,
    KernelSet,
    Map,
    Mix,
    Norm,
    Opaque,
    Pool,
    Sink,
    Source,
    Sum,
    Value,
    refuse_kind,
)

__all__ = ["ChannelName", "KernelUse", "input_channels", "kernel_uses"]

ChannelName: TypeAlias = tuple[str, "int | tuple[int, ...]"]
"""The name of a space, and a channel of it, or a position where several axes tell entries apart."""

ENTRIES = 1 << 24
"""Entries of the tensors that are traced at once."""


@dataclass(frozen=True)
class KernelUse:
    """One use of a kernel set by an op.

    ``kernels`` (int64, ``(out, in / groups)`` of the op) holds the flat index of each kernel among those of
    the parameter, -1 where there is none; ``outputs`` has the channel of every output, and ``sources`` those
    that reach every input channel.
    """

    op: Kernel
    kernels: Tensor
    outputs: tuple[ChannelName, ...]
    sources: tuple[tuple[ChannelName, ...], ...]

    def input_of(self, row: int, column: int) -> int:
        """The input channel of the op that the kernel in this place reads."""
        return row // (len(self.kernels) // self.op.groups) * self.kernels.shape[1] + column


def kernel_uses(
    ops: Sequence[AnyOp], kernels: Mapping[str, KernelSet], names: Collection[str]
) -> Iterator[KernelUse]:
    """Trace every use of the kernel sets ``names``."""
    outputs: dict[int, tuple[ChannelName, ...]] = {}
    for place, op in enumerate(ops):
        if isinstance(op, Kernel) and op.weight.name is not None:
            one = kernels[op.weight.name]
            found = _kernel_indices(op, one)
            own = _outputs(op, one, found)
            if op.weight.name in names:
                yield KernelUse(op, found, own, _BackwardWalk(ops[:place], outputs).sources(op))
            outputs[op.output.index] = own


def input_channels(uses: Sequence[KernelUse], one: KernelSet) -> tuple[tuple[ChannelName, ...], ...]:
    """For every input channel of a kernel set the channels that reach it, in any of its uses."""
    found: list[dict[ChannelName, None]] = [{} for _ in range(one.in_space.size)]
    for use in uses:
        channels = _along_inputs(one, use.kernels)
        for column in range(use.kernels.shape[1]):
            for group in range(use.op.groups):
                rows = slice(*(len(use.kernels) // use.op.groups * g for g in (group, group + 1)))
                known = sorted(set(channels[rows, column][use.kernels[rows, column] >= 0].tolist()))
                if len(known) == 1:
                    source = use.sources[group * use.kernels.shape[1] + column]
                    found[known[0]].update(dict.fromkeys(source))
    return tuple(tuple(sources) for sources in found)


# -- the kernels of one op -------------------------------------------------------------------------------
def _kernel_indices(op: Kernel, one: KernelSet) -> Tensor:
    """Label the parameter's kernels, and look where the op reads each of them."""
    count = one.shape[0] * one.shape[1]
    labels = torch.arange(1, count + 1, dtype=torch.float64).view(*one.shape[:2], *[1] * (len(one.shape) - 2))
    operand = op.weight.operand(lambda _: labels.expand(one.shape))
    if operand.dim() > 2:
        operand = operand.flatten(2).amax(2)
    if op.window is not None and op.window.transposed:  # (in, out / groups), the other way round
        operand = operand.view(op.groups, -1, operand.shape[1]).transpose(1, 2).flatten(0, 1)
    return operand.long() - 1


def _along_outputs(one: KernelSet, kernels: Tensor) -> Tensor:
    """The output channel of each kernel."""
    first, second = kernels // one.shape[1], kernels % one.shape[1]
    return first // (one.shape[0] // one.groups) * one.shape[1] + second if one.transposed else first


def _along_inputs(one: KernelSet, kernels: Tensor) -> Tensor:
    """The input channel of each kernel."""
    first, second = kernels // one.shape[1], kernels % one.shape[1]
    return first if one.transposed else first // (one.shape[0] // one.groups) * one.shape[1] + second


def _outputs(op: Kernel, one: KernelSet, kernels: Tensor) -> tuple[ChannelName, ...]:
    """The parameter's output channels; those of the value, where a row mixes several (a transposed view)."""
    channels, is_there = _along_outputs(one, kernels), kernels >= 0
    top = channels.where(is_there, -1).amax(1)
    if bool(((channels == top[:, None]) | ~is_there).all()) and bool(is_there.any(1).all()):
        return tuple((one.out_space.name, channel) for channel in top.tolist())
    return tuple((f"%{op.output.index}", row) for row in range(len(kernels)))


# -- backwards through the ops ---------------------------------------------------------------------------
class _BackwardWalk:
    """Walks back from an op, through ``ops``, to sources and to values whose channels are in ``outputs``.

    For every value it holds which entries reach which input channel: bool, with an axis of input channels
    before the value's own, and size one along each axis whose entries are all alike.
    """

    def __init__(self, ops: Sequence[AnyOp], outputs: Mapping[int, tuple[ChannelName, ...]]) -> None:
        self.ops, self.outputs = ops, outputs

    def sources(self, op: Kernel) -> tuple[tuple[ChannelName, ...], ...]:
        """The channels that reach each input channel of ``op``."""
        value = op.inputs[0]
        axis = len(value.shape) - 1 - (0 if op.window is None else len(op.window.kernel))
        count = value.shape[axis]
        spread = [one for one in self.ops if isinstance(one, (Gather, Pool))]
        largest = max((math.prod(v.shape) for one in spread for v in one.inputs), default=1)
        step = max(1, ENTRIES // max(1, largest))
        found: list[tuple[ChannelName, ...]] = []
        for start in range(0, count, step):
            rows = torch.eye(count, dtype=torch.bool)[start : start + step]
            shape = [len(rows), *[1] * len(value.shape)]
            shape[axis + 1] = count
            found += self._walk({value.index: rows.view(shape)})
        return tuple(found)

    def _walk(self, reached: dict[int, Tensor]) -> list[tuple[ChannelName, ...]]:
        count = len(next(iter(reached.values())))
        found: list[list[ChannelName]] = [[] for _ in range(count)]
        for op in reversed(self.ops):
            if op.output.index not in reached or not op.output.live:
                continue
            entries = reached.pop(op.output.index)
            if isinstance(op, Source) or op.output.index in self.outputs:
                names = _places(op, entries) if isinstance(op, Source) else self._rows(op, entries)
                for own, more in zip(found, names, strict=True):
                    own[:0] = more
                continue
            for value, part in zip(op.inputs, _backwards(op, entries), strict=True):
                if value.live:
                    known = reached.get(value.index)
                    reached[value.index] = _thin(part if known is None else part | known)
        return [tuple(dict.fromkeys(own)) for own in found]

    def _rows(self, op: AnyOp, entries: Tensor) -> Iterator[list[ChannelName]]:
        """The output channels of a kernel set that have an entry among these."""
        outputs = self.outputs[op.output.index]
        assert isinstance(op, Kernel)
        axis = len(op.output.shape) - (0 if op.window is None else len(op.window.kernel))
        others = [d for d in range(1, entries.dim()) if d != axis]
        rows = entries.amax(others) if others else entries
        for row in rows.expand(-1, len(outputs)).tolist():
            yield [channel for channel, is_there in zip(outputs, row, strict=True) if is_there]


def _places(op: Source, entries: Tensor) -> Iterator[list[ChannelName]]:
    """The entries of an input, by their places along those axes that tell them apart."""
    for own in entries:
        told = [axis for axis, size in enumerate(own.shape) if size > 1]
        places = own.squeeze().nonzero().tolist() if own.numel() > 1 else [[0]] if bool(own.any()) else []
        name = f"%{op.output.index}"
        yield [(name, place[0] if len(told) <= 1 else tuple(place)) for place in places]


def _backwards(op: AnyOp, entries: Tensor) -> list[Tensor]:
    """Find the entries of each input that reach the ``entries`` of the output."""
    match op:
        case Kernel():
            return [_through_fixed_kernel(op, entries)]
        case Sum() | Gate() | Affine() | Norm() | Map():
            return [_unbroadcast(entries, value) for value in op.inputs]
        case Gather():
            return _through_gather(op, entries)
        case Mix():
            return [_through_mix(op, side, entries) for side in (0, 1)]
        case Pool():
            return [_through_pool(op, entries)]
        case Opaque():
            return [_everything(entries, value) for value in op.inputs]
        case Source() | Sink():
            return []
        case _:
            refuse_kind(op)


def _thin(entries: Tensor) -> Tensor:
    """Size one along every axis of the value along which all entries are alike."""
    for axis in range(1, entries.dim()):
        first = entries.narrow(axis, 0, 1)
        if entries.shape[axis] > 1 and bool((entries == first).all()):
            entries = first
    return entries


def _everything(entries: Tensor, value: Value) -> Tensor:
    """All entries of an input, where any of the output counts."""
    return entries.flatten(1).any(1).view(-1, *[1] * len(value.shape))


def _unbroadcast(entries: Tensor, value: Value) -> Tensor:
    """The entries of an input that was broadcast to the output."""
    more = entries.dim() - 1 - len(value.shape)
    if more:
        entries = entries.amax(tuple(range(1, more + 1)))
    for axis, size in enumerate(value.shape, 1):
        if size == 1:
            entries = entries.amax(axis, keepdim=True)
    return entries


def _through_fixed_kernel(op: Kernel, entries: Tensor) -> Tensor:
    """Weights that are not pruned connect all channels of a group, and all positions."""
    windows = 0 if op.window is None else len(op.window.kernel)
    axis = entries.dim() - 1 - windows
    for position in range(axis + 1, entries.dim()):
        entries = entries.amax(position, keepdim=True)
    if entries.shape[axis] == 1 or op.groups == 1:
        return entries.amax(axis, keepdim=True)
    groups = torch.arange(entries.shape[axis]) // (entries.shape[axis] // op.groups)
    in_groups = [entries.index_select(axis, (groups == g).nonzero().flatten()) for g in range(op.groups)]
    reached = torch.cat([part.amax(axis, keepdim=True) for part in in_groups], axis)
    return reached.repeat_interleave(op.inputs[0].shape[axis - 1] // op.groups, axis)


def _through_gather(op: Gather, entries: Tensor) -> list[Tensor]:
    sizes = [math.prod(value.shape) for value in op.inputs]
    flat = op.index_map().flat_index().flatten()
    copied = flat >= 0
    wanted = entries.expand(-1, *op.output.shape).flatten(1)[:, copied]
    found = torch.zeros((len(entries), sum(sizes)), dtype=torch.int32)
    found.index_add_(1, flat[copied], wanted.int())
    parts = (found > 0).split_with_sizes(sizes, 1)
    return [part.view(-1, *value.shape) for part, value in zip(parts, op.inputs, strict=True)]


def _through_mix(op: Mix, side: int, entries: Tensor) -> Tensor:
    value = op.inputs[side]
    if not op.equation:
        return _everything(entries, value)
    inputs, _, out = op.equation.partition("->")
    own = inputs.split(",")[side]
    for axis, letter in enumerate(out, 1):
        if letter not in own:
            entries = entries.amax(axis, keepdim=True)
    order = [out.index(letter) + 1 for letter in own if letter in out]
    rest = [axis + 1 for axis, letter in enumerate(out) if letter not in own]
    sizes = [entries.shape[axis] for axis in order]
    entries = entries.permute([0, *order, *rest]).reshape(-1, *sizes)
    for axis, letter in enumerate(own, 1):
        if letter not in out:
            entries = entries.unsqueeze(axis)
    return _unbroadcast(entries, value)


def _through_pool(op: Pool, entries: Tensor) -> Tensor:
    value = op.inputs[0]
    if op.window is None:
        for axis in op.dims:
            entries = entries if op.keepdim else entries.unsqueeze(axis + 1)
        return entries
    if all(entries.shape[axis + 1] == 1 for axis in op.dims) and entries.dim() == len(value.shape) + 1:
        return entries
    return _adjoint(op.window.total, value, entries.expand(-1, *op.output.shape))


def _adjoint(total: Callable[[Tensor], Tensor], value: Value, wanted: Tensor) -> Tensor:
    """The entries that are summed up in those that are wanted: the gradient of their sum is not 0 there."""
    found = torch.zeros((len(wanted), *value.shape), dtype=torch.bool)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(value.shape, dtype=torch.float64, requires_grad=True)
        y = total(x)
    for row, one in enumerate(wanted):
        (gradient,) = torch.autograd.grad(y, x, one.double(), retain_graph=True)
        found[row] = gradient > 0
    return found
