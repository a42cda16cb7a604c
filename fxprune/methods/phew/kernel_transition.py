"""The link of a kernel op: walkers choose a kernel by its L1 norm, then a weight inside it by its size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ir
from fxprune.methods.phew.transitions import Choice, Members
from fxprune.paths.layout import Layout, reduced_shape

__all__ = ["KernelLink"]

Draw = Callable[[int], Tensor]
ATTEMPTS = 50  # draws before a walker is lost


class KernelLink:
    """From entry (outer, input channel, position) to (outer, output channel, position).

    ``sizes`` are those of the weights of the op's operand, ``usable`` which of them may be passed (same
    shape). A channel all of whose usable weights are zero passes walkers to each of them alike. Where
    positions are told apart (tokens, pixels), the tap says which one a walker comes to; an image is periodic.
    A draw that leads nowhere is drawn again.
    """

    def __init__(self, op: ir.Kernel, sizes: Tensor, usable: Tensor, x: Layout, y: Layout) -> None:
        rank = 0 if op.window is None else len(op.window.kernel)
        axis = len(x) - 1 - rank
        self.groups = op.groups
        transposed = op.window is not None and op.window.transposed
        self.weights = torch.arange(sizes.numel()).view(sizes.shape)
        if transposed:
            sizes, usable, self.weights = (
                swap_orientation(t, op.groups) for t in (sizes, usable, self.weights)
            )
        kernels = sizes.shape[:2]
        self.usable = usable.reshape(*kernels, -1)
        self.sizes = sizes.reshape(*kernels, -1).float() * self.usable
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
        self.moves = None
        if op.window is not None and self.shape_in[2] * self.shape_out[2] > 1:
            self.moves = Moves(op.window, x[-rank:], y[-rank:])
        self.fed = torch.ones(math.prod(self.shape_in), dtype=torch.bool)
        self.feeding = torch.ones(math.prod(self.shape_out), dtype=torch.bool)
        self._index()

    def _index(self) -> None:
        outputs, per_input = self.sizes.shape[:2]
        per_output = outputs // self.groups
        norms, counts = self.sizes.sum(2, dtype=torch.float64), self.usable.sum(2)
        # Inside a kernel of zeros all usable weights are alike.
        inside = self.sizes.where((norms > 0).unsqueeze(2), self.usable.float())
        self.cumulative = inside.cumsum(2)
        by_input = self._by_input(norms), self._by_input(counts)
        self.onward = _choice(*by_input)
        self.back = _choice(norms, counts)
        self.per_input, self.per_output = per_input, per_output

    def _by_input(self, matrix: Tensor) -> Tensor:
        """(out, in / groups) as (in, out / groups)."""
        grouped = matrix.reshape(self.groups, -1, matrix.shape[1])
        return grouped.transpose(1, 2).flatten(0, 1)

    # -- walking --------------------------------------------------------------------------------------------
    def forward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return _insisted(self._forward, self.feeding, entries, ids, draw)

    def backward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return _insisted(self._backward, self.fed, entries, ids, draw)

    def _forward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        outer, classes, position = _unravel(entries, self.shape_in)
        if self.round_robin:  # the network's input: its channels take turns
            channel = ids % len(self.members.index)
        else:
            channel = self.members.pick(classes, draw(len(entries)))
        item = self.onward.draw(channel, draw(len(entries)))
        out = torch.div(channel, self.per_input, rounding_mode="floor") * self.per_output
        out = out + item.clamp(min=0) % self.per_output
        tap = self._inside(out, channel % self.per_input, draw)
        if self.moves is not None:
            position = self.moves.onward(position, tap, draw)
        found = (outer * self.shape_out[1] + out) * self.shape_out[2] + position
        return self._found(found, (item >= 0) & (position >= 0), out, channel % self.per_input, tap)

    def _backward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        outer, out, position = _unravel(entries, self.shape_out)
        item = self.back.draw(out, draw(len(entries)))
        local = item.clamp(min=0) % self.per_input
        channel = torch.div(out, self.per_output, rounding_mode="floor") * self.per_input + local
        tap = self._inside(out, local, draw)
        if self.moves is not None:
            position = self.moves.back(position, tap, draw)
        found = (outer * self.shape_in[1] + self.members.index[channel]) * self.shape_in[2] + position
        return self._found(found, (item >= 0) & (position >= 0), out, local, tap)

    def _found(
        self, entries: Tensor, there: Tensor, out: Tensor, channel: Tensor, tap: Tensor
    ) -> tuple[Tensor, Tensor]:
        return entries.where(there, -1), self.weights[out, channel, tap].where(there, -1)

    def _inside(self, out: Tensor, channel: Tensor, draw: Draw) -> Tensor:
        """A tap of each kernel."""
        if self.sizes.shape[2] == 1:
            return torch.zeros_like(out)
        kernel = out * self.per_input + channel
        cumulative = self.cumulative.view(-1, self.sizes.shape[2])[kernel]
        chance = draw(len(out)).float().unsqueeze(1) * cumulative[:, -1:]
        return (cumulative <= chance).sum(1).clamp(max=cumulative.shape[1] - 1)

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
        return (there & positions.unsqueeze(1) if self.moves is None else there).reshape(-1)

    def within(self, fed: Tensor, feeding: Tensor) -> None:
        self.fed, self.feeding = fed, feeding
        inputs = (
            fed.view(self.shape_in).any(2).any(0)[self.members.index].view(self.groups, 1, self.per_input)
        )
        outputs = feeding.view(self.shape_out).any(2).any(0).view(self.groups, self.per_output, 1)
        used = (inputs & outputs).flatten(0, 1).unsqueeze(2)
        if not bool(used.all()):
            self.usable = self.usable & used
            self.sizes = self.sizes * used
            self._index()


class Moves:
    """Where a tap of a window leads from a position, on a periodic image, along all of its axes.

    Positions are flat indices of the reduced axes ``x`` (before) and ``y`` (after).
    """

    def __init__(self, window: ir.Window, x: Layout, y: Layout) -> None:
        self.window, self.x, self.y = window, x, y
        self.members = [[Members.of(axis.index(), axis.count) for axis in layout] for layout in (x, y)]

    def onward(self, position: Tensor, tap: Tensor, draw: Draw) -> Tensor:
        """Positions after; ``-1`` where the tap leads to none."""
        return self._moved(position, tap, draw, 0)

    def back(self, position: Tensor, tap: Tensor, draw: Draw) -> Tensor:
        """Positions before; ``-1`` where the tap comes from none."""
        return self._moved(position, tap, draw, 1)

    def _moved(self, position: Tensor, tap: Tensor, draw: Draw, side: int) -> Tensor:
        here, there = (self.x, self.y) if side == 0 else (self.y, self.x)
        result, there_is = torch.zeros_like(position), torch.ones_like(position, dtype=torch.bool)
        scale = 1
        for dim in reversed(range(len(here))):
            window, size = self.window, self.window.kernel[dim]
            full = self.members[side][dim].pick(position % here[dim].count, draw(len(position)))
            position = torch.div(position, here[dim].count, rounding_mode="floor")
            offset = (tap % size) * window.dilation[dim] - window.padding[dim][0]
            tap = torch.div(tap, size, rounding_mode="floor")
            # A convolution reads ``y * stride + offset``; a transposed one writes there.
            if (side == 0) == window.transposed:
                moved = full * window.stride[dim] + offset
            else:
                moved = full - offset
                if here[dim].size > 1:
                    moved = moved % here[dim].size
                there_is &= moved % window.stride[dim] == 0
                moved = torch.div(moved, window.stride[dim], rounding_mode="floor")
            moved = moved % there[dim].size
            result = result + there[dim].index()[moved] * scale
            scale *= there[dim].count
        return result.where(there_is, -1)


def _insisted(
    go: Callable[[Tensor, Tensor, Draw], tuple[Tensor, Tensor]],
    wanted: Tensor,
    entries: Tensor,
    ids: Tensor,
    draw: Draw,
) -> tuple[Tensor, Tensor]:
    """``go``, again and again where it does not lead to a ``wanted`` entry."""
    found, weights = go(entries, ids, draw)
    for _ in range(ATTEMPTS):
        again = ((found < 0) | ~wanted[found.clamp(min=0)]).nonzero().flatten()
        if not len(again):
            return found, weights
        found[again], weights[again] = go(entries[again], ids[again], draw)
    there = (found >= 0) & wanted[found.clamp(min=0)]
    return found.where(there, -1), weights.where(there, -1)


def _choice(sizes: Tensor, counts: Tensor) -> Choice:
    """Rows of a matrix; one whose sizes are all zero goes by ``counts``."""
    rows, columns = sizes.shape
    sizes = sizes.where(sizes.sum(1, keepdim=True) > 0, counts.double())
    return Choice(torch.arange(rows).repeat_interleave(columns), sizes.flatten(), rows)


def _unravel(entries: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    position = entries % shape[2]
    rest = torch.div(entries, shape[2], rounding_mode="floor")
    return torch.div(rest, shape[1], rounding_mode="floor"), rest % shape[1], position
