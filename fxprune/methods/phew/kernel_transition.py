"""The transition of a contraction: walkers choose a kernel by its L1 norm, then a weight by its size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.channels.orientation import swap_orientation
from fxprune.graph import ir
from fxprune.methods.phew.transitions import Draw, Members, RowSampler
from fxprune.paths.layout import Layout, reduced_shape

__all__ = ["KernelTransition"]

ATTEMPTS = 50
"""Draws before a walker is lost."""

Shape3 = tuple[int, int, int]


class KernelTransition:
    """From entry (outer, input channel, position) to entry (outer, output channel, position).

    ``sizes`` are |w| of the op's operand, ``usable`` which of its weights may be passed (same shape). A
    channel whose usable weights are all zero passes walkers through each of them alike. Where positions
    differ (tokens, pixels), the tap says which one a walker comes to; images are periodic. A draw that leads
    nowhere is repeated.

    Weights are kept as (out, in / groups, taps) for every kind of layer.
    """

    def __init__(self, op: ir.Kernel, sizes: Tensor, usable: Tensor, x: Layout, y: Layout) -> None:
        rank = 0 if op.window is None else len(op.window.kernel)
        places = torch.arange(sizes.numel()).view(sizes.shape)
        if op.window is not None and op.window.transposed:
            sizes, usable, places = (swap_orientation(t, op.groups) for t in (sizes, usable, places))
        outputs, self.per_input = sizes.shape[:2]
        self.groups, self.per_output = op.groups, outputs // op.groups
        self.usable = usable.reshape(outputs, self.per_input, -1)
        self.sizes = sizes.reshape(self.usable.shape).float() * self.usable
        self.places = places.reshape(self.usable.shape)
        channels = x[len(x) - 1 - rank]
        self.members = Members.of(channels.index(), channels.count)
        self.takes_turns = channels.is_collapsed
        self.shape_in = _around(reduced_shape(x), rank)
        outer, _, position = _around(reduced_shape(y), rank)
        self.shape_out = (outer, outputs, position)
        self.taps = None
        if op.window is not None and self.shape_in[2] * self.shape_out[2] > 1:
            self.taps = TapMoves(op.window, x[-rank:], y[-rank:])
        self.valid_in = torch.ones(math.prod(self.shape_in), dtype=torch.bool)
        self.valid_out = torch.ones(math.prod(self.shape_out), dtype=torch.bool)
        self._index()

    def _index(self) -> None:
        norms, counts = self.sizes.sum(2, dtype=torch.float64), self.usable.sum(2)
        # In a kernel of zeros all usable weights are alike.
        inside = self.sizes.where((norms > 0).unsqueeze(2), self.usable.float())
        self._cumulative = inside.cumsum(2)
        self._output_of = _sampler(
            swap_orientation(norms, self.groups), swap_orientation(counts, self.groups)
        )
        self._input_of = _sampler(norms, counts)

    # -- walking ----------------------------------------------------------------------------------------
    def forward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return _retry_until_valid(self._forward, self.valid_out, entries, ids, draw)

    def backward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        return _retry_until_valid(self._backward, self.valid_in, entries, ids, draw)

    def _forward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        outer, classes, position = _unravel(entries, self.shape_in)
        if self.takes_turns:  # the network's input, all of whose channels are one class
            channel = ids % len(self.members.index)
        else:
            channel = self.members.draw(classes, draw(len(entries)))
        item = self._output_of.draw(channel, draw(len(entries)))
        group, local = torch.div(channel, self.per_input, rounding_mode="floor"), channel % self.per_input
        out = group * self.per_output + item.clamp(min=0) % self.per_output
        tap = self._draw_tap(out, local, draw)
        if self.taps is not None:
            position = self.taps.forward(position, tap, draw)
        found = (outer * self.shape_out[1] + out) * self.shape_out[2] + position
        is_found = (item >= 0) & (position >= 0)
        return found.where(is_found, -1), self.places[out, local, tap].where(is_found, -1)

    def _backward(self, entries: Tensor, ids: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        outer, out, position = _unravel(entries, self.shape_out)
        item = self._input_of.draw(out, draw(len(entries)))
        group, local = (
            torch.div(out, self.per_output, rounding_mode="floor"),
            item.clamp(min=0) % self.per_input,
        )
        channel = group * self.per_input + local
        tap = self._draw_tap(out, local, draw)
        if self.taps is not None:
            position = self.taps.backward(position, tap, draw)
        found = (outer * self.shape_in[1] + self.members.index[channel]) * self.shape_in[2] + position
        is_found = (item >= 0) & (position >= 0)
        return found.where(is_found, -1), self.places[out, local, tap].where(is_found, -1)

    def _draw_tap(self, out: Tensor, local: Tensor, draw: Draw) -> Tensor:
        """A weight of each kernel (``out``, ``local``), by its size."""
        taps = self.sizes.shape[2]
        if taps == 1:
            return torch.zeros_like(out)
        cumulative = self._cumulative.view(-1, taps)[out * self.per_input + local]
        chance = draw(len(out)).float().unsqueeze(1) * cumulative[:, -1:]
        return (cumulative <= chance).sum(1).clamp(max=taps - 1)

    # -- reachability -----------------------------------------------------------------------------------
    def reached_from(self, inputs: Tensor) -> Tensor:
        classes = inputs.view(self.shape_in).any(2)
        channels = classes[:, self.members.index].double().view(-1, self.groups, self.per_input)
        outputs = torch.einsum("agi,goi->ago", channels, self._kernels()).flatten(1) > 0
        return self._at_positions(inputs.view(self.shape_in).any(1), outputs, self.shape_out)

    def leading_to(self, outputs: Tensor) -> Tensor:
        channels = outputs.view(self.shape_out).any(2).double().view(-1, self.groups, self.per_output)
        inputs = torch.einsum("ago,goi->agi", channels, self._kernels()).flatten(1) > 0
        classes = torch.zeros(self.shape_in[:2]).index_add_(1, self.members.index, inputs.float()) > 0
        return self._at_positions(outputs.view(self.shape_out).any(1), classes, self.shape_in)

    def restrict(self, inputs: Tensor, outputs: Tensor) -> None:
        self.valid_in, self.valid_out = inputs, outputs
        channels = inputs.view(self.shape_in).any(2).any(0)[self.members.index]
        used_in = channels.view(self.groups, 1, self.per_input)
        used_out = outputs.view(self.shape_out).any(2).any(0).view(self.groups, self.per_output, 1)
        used = (used_in & used_out).flatten(0, 1).unsqueeze(2)
        if not bool(used.all()):
            self.usable = self.usable & used
            self.sizes = self.sizes * used
            self._index()

    def _kernels(self) -> Tensor:
        """1 for every kernel with a usable weight: (groups, out / groups, in / groups)."""
        return self.usable.any(2).double().view(self.groups, self.per_output, self.per_input)

    def _at_positions(self, positions: Tensor, channels: Tensor, shape: Shape3) -> Tensor:
        """Channels (outer x channels) at the positions that are used; at all of them where taps move."""
        found = channels.unsqueeze(2).expand(shape)
        return (found & positions.unsqueeze(1) if self.taps is None else found).reshape(-1)


class TapMoves:
    """The position that a tap of a window leads to, on a periodic image.

    Positions are flat indices of the reduced axes ``x`` (before the op) and ``y`` (after it).
    """

    def __init__(self, window: ir.Window, x: Layout, y: Layout) -> None:
        self.window, self.x, self.y = window, x, y
        self.members_x, self.members_y = (
            [Members.of(axis.index(), axis.count) for axis in layout] for layout in (x, y)
        )

    def forward(self, position: Tensor, tap: Tensor, draw: Draw) -> Tensor:
        """Positions after the op; ``-1`` where the tap leads to none."""
        return self._moved(position, tap, draw, (self.x, self.members_x, self.y), not self.window.transposed)

    def backward(self, position: Tensor, tap: Tensor, draw: Draw) -> Tensor:
        """Positions before the op; ``-1`` where the tap comes from none."""
        return self._moved(position, tap, draw, (self.y, self.members_y, self.x), self.window.transposed)

    def _moved(
        self,
        position: Tensor,
        tap: Tensor,
        draw: Draw,
        axes: tuple[Layout, list[Members], Layout],
        is_strided: bool,
    ) -> Tensor:
        """Move along every axis. ``is_strided``: from the larger image to the smaller one."""
        here, members, there = axes
        result, is_found = torch.zeros_like(position), torch.ones_like(position, dtype=torch.bool)
        scale = 1
        for dim in reversed(range(len(here))):
            size = self.window.kernel[dim]
            full = members[dim].draw(position % here[dim].count, draw(len(position)))
            position = torch.div(position, here[dim].count, rounding_mode="floor")
            moved, fits = self._along(dim, full, tap % size, here[dim].size, is_strided)
            tap = torch.div(tap, size, rounding_mode="floor")
            is_found &= fits
            result = result + there[dim].index()[moved % there[dim].size] * scale
            scale *= there[dim].count
        return result.where(is_found, -1)

    def _along(
        self, dim: int, place: Tensor, tap: Tensor, size: int, is_strided: bool
    ) -> tuple[Tensor, Tensor]:
        """The place along one axis, and whether the stride stops there.

        Place p of the smaller image meets place ``p * stride + offset`` of the larger one.
        """
        window = self.window
        offset = tap * window.dilation[dim] - window.padding[dim][0]
        if not is_strided:
            return place * window.stride[dim] + offset, torch.ones_like(place, dtype=torch.bool)
        moved = place - offset
        if size > 1:
            moved = moved % size
        return torch.div(moved, window.stride[dim], rounding_mode="floor"), moved % window.stride[dim] == 0


def _retry_until_valid(
    go: Callable[[Tensor, Tensor, Draw], tuple[Tensor, Tensor]],
    valid: Tensor,
    entries: Tensor,
    ids: Tensor,
    draw: Draw,
) -> tuple[Tensor, Tensor]:
    """Repeat ``go`` for the walkers that it does not bring to a ``valid`` entry."""
    found, weights = go(entries, ids, draw)
    for _ in range(ATTEMPTS):
        again = ((found < 0) | ~valid[found.clamp(min=0)]).nonzero().flatten()
        if not len(again):
            return found, weights
        found[again], weights[again] = go(entries[again], ids[again], draw)
    is_valid = (found >= 0) & valid[found.clamp(min=0)]
    return found.where(is_valid, -1), weights.where(is_valid, -1)


def _sampler(sizes: Tensor, counts: Tensor) -> RowSampler:
    """Draws a column of each row of a matrix; a row whose sizes are all zero goes by ``counts``."""
    rows, columns = sizes.shape
    sizes = sizes.where(sizes.sum(1, keepdim=True) > 0, counts.double())
    return RowSampler(torch.arange(rows).repeat_interleave(columns), sizes.flatten(), rows)


def _around(shape: tuple[int, ...], rank: int) -> Shape3:
    """``shape`` as (outer, channels, positions); positions are the last ``rank`` axes."""
    axis = len(shape) - 1 - rank
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _unravel(entries: Tensor, shape: Shape3) -> tuple[Tensor, Tensor, Tensor]:
    position = entries % shape[2]
    rest = torch.div(entries, shape[2], rounding_mode="floor")
    return torch.div(rest, shape[1], rounding_mode="floor"), rest % shape[1], position
