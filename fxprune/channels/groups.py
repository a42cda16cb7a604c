"""Ties: which output channels of which parameters meet with no weight in between.

A ``ChannelGraph`` comes in; a group number for every output channel of every parameter goes out. Every entry
of every value is labelled with the channel that it comes from; ops move labels, and where two meet their
channels are joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ChannelGraph, ir

NONE = 0
"""The label of an entry that comes from no channel: the input, a constant, padding."""


def channel_groups(graph: ChannelGraph) -> dict[str, Tensor]:
    """Parameter -> group number of each output channel (int64); channels of equal number are tied.

    Output channels are counted as in a value: those of a transposed convolution run over its groups first.
    """
    return _Labelling(graph).groups()


class _Labelling:
    """One pass over the ops, with a union-find over channels (labels from 1).

    Labels of a value have its rank, and size one along axes where they are all the same.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.first: dict[str, int] = {}
        size = 1
        for name, kernels in graph.kernels.items():
            self.first[name] = size
            size += kernels.out_space.size
        self.root = torch.arange(size)
        self.labels: dict[int, Tensor] = {}

    def groups(self) -> dict[str, Tensor]:
        last = {value.index: place for place, op in enumerate(self.graph.ops) for value in op.inputs}
        for place, op in enumerate(self.graph.ops):
            if not isinstance(op, ir.Sink):
                self.labels[op.output.index] = _thin(self._step(op))
            for value in op.inputs:  # let go of what nobody reads again
                if last[value.index] == place:
                    self.labels.pop(value.index, None)
        return {
            name: self.root[first : first + self.graph.kernels[name].out_space.size]
            for name, first in self.first.items()
        }

    def _step(self, op: ir.Op) -> Tensor:
        inputs = [self.root[self.labels[value.index]] for value in op.inputs]
        if isinstance(op, ir.Kernel):
            return self._kernel(op, inputs[0])
        if isinstance(op, (ir.Sum, ir.Gate)):
            found = inputs[0]
            for other in inputs[1:]:
                found = self._meet(*torch.broadcast_tensors(found, other))  # type: ignore[no-untyped-call]
            return found.view((1,) * (len(op.output.shape) - found.dim()) + found.shape)
        if isinstance(op, ir.Gather):
            full = [x.expand(value.shape) for x, value in zip(inputs, op.inputs, strict=True)]
            moved: Tensor = op.move(*[x.double().contiguous() for x in full])
            return moved.long()
        if isinstance(op, ir.Mix) and op.equation:
            return self._mix(op.equation, inputs[0], inputs[1])
        if isinstance(op, ir.Pool):
            return self._pool(op, inputs[0])
        if isinstance(op, (ir.Affine, ir.Norm, ir.Map)):
            return inputs[0].view((1,) * (len(op.output.shape) - inputs[0].dim()) + inputs[0].shape)
        return torch.full((1,) * len(op.output.shape), NONE)

    # -- joining ---------------------------------------------------------------------------------------
    def _join(self, a: Tensor, b: Tensor) -> None:
        """Ties the channels of two tensors of labels, entry by entry."""
        both = (a != NONE) & (b != NONE) & (a != b)
        if not both.any():
            return
        pairs = torch.unique(torch.stack([a[both], b[both]]), dim=1).T.tolist()
        parent: dict[int, int] = {}

        def find(x: int) -> int:
            while parent.get(x, x) != x:
                x = parent[x]
            return x

        for left, right in pairs:
            low, high = sorted((find(left), find(right)))
            parent[high] = low
        new = torch.arange(len(self.root))
        for child in list(parent):
            new[child] = find(child)
        self.root = new[self.root]

    def _meet(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels where two values are added or multiplied: tied where each of one meets one of the other.

        Where they run along different axes (tokens and features of a mixer) there is nothing to tie, and the
        labels of the older layer go on.
        """
        both = (a != NONE) & (b != NONE)
        if bool(both.any()):
            pairs = torch.unique(torch.stack([a[both], b[both]]), dim=1)
            if all(len(torch.unique(side)) == pairs.shape[1] for side in pairs):
                self._join(a, b)
            elif bool(pairs[1].min() < pairs[0].min()):
                a, b = b, a
        return self.root[a.where(a != NONE, b)]

    # -- ops -------------------------------------------------------------------------------------------
    def _kernel(self, op: ir.Kernel, x: Tensor) -> Tensor:
        own = self._rows(op)
        axis = x.dim() - 1 if op.window is None else x.dim() - 1 - len(op.window.kernel)
        shape = [1] * x.dim()
        shape[axis] = len(own)
        if op.groups == op.inputs[0].shape[axis] > 1:  # depthwise: one input channel each
            inputs = x.movedim(axis, 0).flatten(1)[:, 0].expand(op.groups)
            self._join(own, inputs.repeat_interleave(len(own) // op.groups))
        return self.root[own].reshape(shape)

    def _rows(self, op: ir.Kernel) -> Tensor:
        """The label of every output channel of a contraction, read off labelled weights."""
        name = op.weight.name
        transposed = op.window is not None and op.window.transposed
        if name is None:
            return torch.full((op.output.shape[-1 - len(op.window.kernel) if op.window else -1],), NONE)
        kernels = self.graph.kernels[name]
        labels = self.first[name] + torch.arange(kernels.out_space.size)
        if transposed:
            labels = labels.view(op.groups, 1, -1).expand(-1, kernels.shape[0] // op.groups, -1).flatten(0, 1)
            labels = labels.view(*labels.shape, *[1] * (len(kernels.shape) - 2))
        else:
            labels = labels.view(-1, *[1] * (len(kernels.shape) - 1))
        operand = op.weight.operand(lambda _: labels.expand(kernels.shape).double()).long()
        if transposed:
            operand = swap_orientation(operand, op.groups)
        rows = operand.flatten(1)
        return torch.where((rows == rows[:, :1]).all(1), rows[:, 0], NONE)

    def _mix(self, equation: str, a: Tensor, b: Tensor) -> Tensor:
        """All that meets in one entry of the output is tied: the channels of one head of attention."""
        operands, _, out = equation.partition("->")
        left, right = operands.split(",")
        letters = list(dict.fromkeys(out + left + right))
        parts = [self._spread(x, own, letters) for x, own in ((a, left), (b, right))]
        a, b = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
        self._join(a, b)
        found = self.root[a.where(a != NONE, b)]
        for dim in range(len(out), len(letters)):
            top = found.amax(dim, keepdim=True)
            self._join(found, top.expand(found.shape))
            found = self.root[top]
        return found.flatten(len(out))[..., 0] if len(letters) > len(out) else found

    def _spread(self, x: Tensor, own: str, letters: Sequence[str]) -> Tensor:
        present = [letter for letter in letters if letter in own]
        ordered = x.permute([own.index(letter) for letter in present])
        for place, letter in enumerate(letters):
            if letter not in own:
                ordered = ordered.unsqueeze(place)
        return ordered

    def _pool(self, op: ir.Pool, x: Tensor) -> Tensor:
        for dim in op.dims:
            if x.shape[dim] > 1:  # a mean over channels or heads does not ask for all of them
                x = torch.full_like(x.narrow(dim, 0, 1), NONE)
        if op.window is not None:
            if x.dim() != len(op.output.shape):
                return torch.full((1,) * len(op.output.shape), NONE)
            return x
        return x if op.keepdim else x.reshape([n for d, n in enumerate(x.shape) if d not in op.dims])


def _thin(x: Tensor) -> Tensor:
    """``x`` with size one along axes where it is constant."""
    for dim, size in enumerate(x.shape):
        if size > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return x
