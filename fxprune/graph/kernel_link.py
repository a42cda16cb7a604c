"""The link of a kernel op: walkers choose a kernel by its L1 norm, then a weight inside it by its size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.graph.layout import Layout, reduced_shape
from fxprune.graph.links import Choice, Members

__all__ = ["KernelLink"]


class KernelLink:
    """From entry (outer, input channel, position) to (outer, output channel, position).

    ``sizes`` are those of the weights of the op's operand, ``usable`` which of them may be passed (same
    shape). A channel all of whose usable weights are zero passes walkers to each of them alike. A position
    that is told apart (a token, a pixel) stays where the op leaves it; where it mixes positions, one of the
    others is drawn.
    """

    def __init__(self, op: ir.Kernel, sizes: Tensor, usable: Tensor, x: Layout, y: Layout) -> None:
        rank = 0 if op.window is None else len(op.window.kernel)
        axis = len(x) - 1 - rank
        self.groups = op.groups
        transposed = op.window is not None and op.window.transposed
        self.weights = torch.arange(sizes.numel()).view(sizes.shape)
        if transposed:
            sizes, usable, self.weights = (_turned(t, op.groups) for t in (sizes, usable, self.weights))
        kernels = sizes.shape[:2]
        self.usable = usable.reshape(*kernels, -1)
        self.sizes = sizes.reshape(*kernels, -1).double() * self.usable
        self.weights = self.weights.reshape(*kernels, -1)
        self.members = Members.of(x[axis].index(), x[axis].count)
        self.round_robin = x[axis].is_collapsed
        shape_in, shape_out = reduced_shape(x), reduced_shape(y)
        self.shape_in = (math.prod(shape_in[:axis]), shape_in[axis], math.prod(shape_in[axis + 1 :]))
        out_axis = len(y) - 1 - rank
        self.shape_out = (
            math.prod(shape_out[:out_axis]),
            sizes.shape[0],
            math.prod(shape_out[out_axis + 1 :]),
        )
        pointwise = op.window is None or op.window.is_pointwise
        self.stays = pointwise and self.shape_in[2] == self.shape_out[2]
        self._index()

    def _index(self) -> None:
        outputs, per_input = self.sizes.shape[:2]
        per_output = outputs // self.groups
        norms, counts = self.sizes.sum(2), self.usable.sum(2)
        by_input = self._by_input(norms), self._by_input(counts)
        self.onward = _choice(*by_input)
        self.back = _choice(norms, counts)
        self.per_input, self.per_output = per_input, per_output

    def _by_input(self, matrix: Tensor) -> Tensor:
        """(out, in / groups) as (in, out / groups)."""
        grouped = matrix.reshape(self.groups, -1, matrix.shape[1])
        return grouped.transpose(1, 2).flatten(0, 1)

    # -- walking --------------------------------------------------------------------------------------------
    def forward(self, entries: Tensor, ids: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        outer, classes, position = _unravel(entries, self.shape_in)
        number = len(entries)
        if self.round_robin:  # the network's input: its channels take turns
            channel = ids % len(self.members.index)
        else:
            channel = self.members.pick(classes, draw(number))
        item = self.onward.draw(channel, draw(number))
        is_lost = item < 0
        item = item.clamp(min=0)
        out = torch.div(channel, self.per_input, rounding_mode="floor") * self.per_output
        out = out + item % self.per_output
        weight = self._inside(out, channel % self.per_input, draw)
        if not self.stays:
            position = (draw(number) * self.shape_out[2]).long()
        found = (outer * self.shape_out[1] + out) * self.shape_out[2] + position
        return found.where(~is_lost, -1), weight.where(~is_lost, -1)

    def backward(self, entries: Tensor, ids: Tensor, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        outer, out, position = _unravel(entries, self.shape_out)
        number = len(entries)
        item = self.back.draw(out, draw(number))
        is_lost = item < 0
        item = item.clamp(min=0) % self.per_input
        channel = torch.div(out, self.per_output, rounding_mode="floor") * self.per_input + item
        weight = self._inside(out, item, draw)
        if not self.stays:
            position = (draw(number) * self.shape_in[2]).long()
        found = (outer * self.shape_in[1] + self.members.index[channel]) * self.shape_in[2] + position
        return found.where(~is_lost, -1), weight.where(~is_lost, -1)

    def _inside(self, out: Tensor, channel: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """A weight of each kernel."""
        if self.sizes.shape[2] == 1:
            return self.weights[out, channel, 0]
        inside = self.sizes[out, channel]
        total = inside.sum(1, keepdim=True)
        inside = inside.where(total > 0, self.usable[out, channel].double())
        cumulative = inside.cumsum(1)
        chance = draw(len(out)).unsqueeze(1) * cumulative[:, -1:]
        tap = (cumulative <= chance).sum(1).clamp(max=inside.shape[1] - 1)
        return self.weights[out, channel, tap]

    # -- reachability ---------------------------------------------------------------------------------------
    def spread(self, fed: Tensor) -> Tensor:
        per_class = fed.view(self.shape_in).any(2)
        channels = per_class[:, self.members.index].double()
        reached = self._contract(channels, self.usable.any(2).double())
        return self._at_positions(fed.view(self.shape_in).any(1), reached, self.shape_out)

    def gather(self, feeding: Tensor) -> Tensor:
        outputs = feeding.view(self.shape_out).any(2).double()
        kernels = self.usable.any(2).double().reshape(self.groups, self.per_output, self.per_input)
        grouped = outputs.view(-1, self.groups, self.per_output)
        channels = torch.einsum("ago,goi->agi", grouped, kernels).flatten(1) > 0
        classes = torch.zeros(self.shape_in[:2]).index_add_(1, self.members.index, channels.float()) > 0
        return self._at_positions(feeding.view(self.shape_out).any(1), classes, self.shape_in)

    def _contract(self, channels: Tensor, kernels: Tensor) -> Tensor:
        grouped = channels.view(-1, self.groups, self.per_input)
        kernels = kernels.view(self.groups, self.per_output, self.per_input)
        return torch.einsum("agi,goi->ago", grouped, kernels).flatten(1) > 0

    def _at_positions(self, positions: Tensor, channels: Tensor, shape: tuple[int, int, int]) -> Tensor:
        there = channels.unsqueeze(2).expand(shape)
        return (there & positions.unsqueeze(1) if self.stays else there).reshape(-1)

    def within(self, fed: Tensor, feeding: Tensor) -> None:
        inputs = (
            fed.view(self.shape_in).any(2).any(0)[self.members.index].view(self.groups, 1, self.per_input)
        )
        outputs = feeding.view(self.shape_out).any(2).any(0).view(self.groups, self.per_output, 1)
        used = (inputs & outputs).flatten(0, 1).unsqueeze(2)
        if not bool(used.all()):
            self.usable = self.usable & used
            self.sizes = self.sizes * used
            self._index()


def _choice(sizes: Tensor, counts: Tensor) -> Choice:
    """Rows of a matrix; one whose sizes are all zero goes by ``counts``."""
    rows, columns = sizes.shape
    sizes = sizes.where(sizes.sum(1, keepdim=True) > 0, counts.double())
    return Choice(torch.arange(rows).repeat_interleave(columns), sizes.flatten(), rows)


def _unravel(entries: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    position = entries % shape[2]
    rest = torch.div(entries, shape[2], rounding_mode="floor")
    return torch.div(rest, shape[1], rounding_mode="floor"), rest % shape[1], position


def _turned(x: Tensor, groups: int) -> Tensor:
    """A transposed convolution's (in, out / groups, *taps) as (out, in / groups, *taps)."""
    return x.reshape(groups, -1, *x.shape[1:]).transpose(1, 2).flatten(0, 1)
