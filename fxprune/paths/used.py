"""Find the channels and the layers that paths use: what `reach` says of weights, without their number.

No tensor of the size of a parameter outlives the step that reads it: weights are held as bits, and their
derivatives are reduced to marks of rows and columns as they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.count import check_weights
from fxprune.paths.program import Program, Resolution, compile_bound, compile_graph
from fxprune.paths.scaled import Tested
from fxprune.paths.traversal import EdgeWeights, Traversal

__all__ = ["Used", "layers_of", "used_channels", "used_layers"]

Used = dict[str, tuple[Tensor, Tensor]]
"""By parameter: marks of its output channels (out,) and its input channels (in,), bool."""


class _Channels(torch.autograd.Function):
    """Reads a mask as zeros and ones; the derivative marks rows and columns that have a used weight."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, mask: Tensor, kernels: ir.KernelSet) -> Tensor:
        ctx.mask, ctx.kernels = mask, kernels
        return mask.view(torch.uint8).float()  # arithmetic on bytes is several times faster than on bits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        used = ctx.kernels.by_axes((gradient > 0.5) & ctx.mask).contiguous().view(torch.uint8)
        if used.dim() > 2:
            used = used.flatten(2).amax(2)
        if ctx.kernels.groups > 1:
            used = used.view(ctx.kernels.groups, -1, used.shape[1])
        else:
            used = used[None]
        first, second = used.amax(2), used.amax(1)  # (groups, rows), (groups, columns) of the parameter
        if ctx.kernels.transposed:
            first, second = second, first
        return first.flatten().float(), second.flatten().float(), None, None


def used_channels(
    graph: ir.ChannelGraph, masks: Mapping[str, Tensor], *, resolution: Resolution = "spatial"
) -> Used:
    """Return the channels of every parameter that have an effective weight (see `reach`).

    Args:
        graph: the lowered network.
        masks: bool tensors by kernel name; a kernel that is missing counts as dense.
        resolution: as for `reach`.

    Returns:
        For every kernel of the graph its output channels (out,) and its input channels (in,), bool.

    Raises:
        ValueError: a name that the graph does not have, or a shape that is not the parameter's.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(2, 1)))
        >>> used_channels(graph, {"0.weight": torch.tensor([[True], [False]])})["1.weight"]
        (tensor([True]), tensor([ True, False]))
    """
    check_weights(graph, masks)
    program = compile_graph(graph, resolution)
    device = next((mask.device for mask in masks.values()), torch.device("cpu"))
    gates: dict[str, tuple[Tensor, Tensor]] = {}
    for name, kernels in graph.kernels.items():
        sizes = (kernels.outputs, kernels.inputs)
        rows, columns = (torch.ones(size, device=device, requires_grad=True) for size in sizes)
        gates[name] = rows, columns

    def make(name: str, mask: Tensor) -> Tensor:
        weights: Tensor = _Channels.apply(*gates[name], mask, graph.kernels[name])
        return weights

    held = _HeldAsBits(graph, masks, device, make)
    flat = [gate for pair in gates.values() for gate in pair]
    found = held.slopes(program, flat)
    marks = [
        torch.zeros(len(gate), dtype=torch.bool, device=device) if slope is None else slope > 0.5
        for gate, slope in zip(flat, found, strict=True)
    ]
    return dict(zip(gates, zip(marks[::2], marks[1::2], strict=True), strict=True))


def used_layers(
    graph: ir.ChannelGraph, masks: Mapping[str, Tensor], *, resolution: Resolution = "spatial"
) -> set[str]:
    """Return the parameters that have an effective weight, of the arguments of `used_channels`.

    One is found where a contraction gives something that leads on: no derivative by weights is needed.

    >>> from fxprune.capture import capture
    >>> from fxprune.lowering import lower
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
    >>> graph = lower(capture(net, torch.ones(2, 1)))
    >>> used_layers(graph, {"0.weight": torch.tensor([[False], [False]])})
    set()
    """
    check_weights(graph, masks)
    if resolution == "spatial" and any(_has_border(op) for op in graph.ops):
        # Mostly the taps that are inside of the image everywhere are enough, which is several times faster.
        found = layers_of(graph, masks, compile_bound(graph))
        if len(found) == len(graph.kernels):
            return found
    return layers_of(graph, masks, compile_graph(graph, resolution))


def _has_border(op: ir.AnyOp) -> bool:
    return isinstance(op, ir.Kernel | ir.Pool) and op.window is not None


def layers_of(graph: ir.ChannelGraph, masks: Mapping[str, Tensor], program: Program) -> set[str]:
    """Return the parameters that lie on a path of one program of ``graph``."""
    device = next((mask.device for mask in masks.values()), torch.device("cpu"))
    gates = {name: torch.ones((), device=device, requires_grad=True) for name in graph.kernels}
    held = _HeldAsBits(graph, masks, device, lambda name, mask: mask.view(torch.uint8).float())
    found = held.slopes(program, list(gates.values()), lambda op, y: y * gates[str(op.weight.name)])
    return {name for name, slope in zip(gates, found, strict=True) if slope is not None and bool(slope > 0.5)}


Packed = Tensor | tuple[Tensor, torch.Size, tuple[int, ...], int]


class _HeldAsBits:
    """Differentiates a traversal whose weights are made of masks, which alone are held.

    ``make``: makes the weights of a parameter of its mask.
    """

    def __init__(
        self,
        graph: ir.ChannelGraph,
        masks: Mapping[str, Tensor],
        device: torch.device,
        make: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.graph, self.masks, self.device, self.make = graph, masks, device, make
        self.mask = self.weights = torch.zeros(0)  # the last that were made

    def slopes(
        self,
        program: Program,
        leaves: list[Tensor],
        after_kernel: Callable[[ir.Kernel, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return the derivatives of the presence of a path; None where there is none."""
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            edges = EdgeWeights(
                self.graph, {}, torch.float32, self.device, rescale=False, make=self._weights_of
            )
            traversal = Traversal(program, Tested(self.device), edges, after_kernel=after_kernel)
            total, _ = traversal.total()
            if not total.requires_grad:
                return (None,) * len(leaves)
            return torch.autograd.grad(total, leaves, allow_unused=True)

    def _weights_of(self, name: str) -> Tensor:
        mask = self.masks.get(name)
        if mask is None:
            mask = torch.ones(self.graph.kernels[name].shape, dtype=torch.bool, device=self.device)
        self.mask = mask.bool().contiguous()
        self.weights = self.make(name, self.mask)
        return self.weights

    def _pack(self, saved: Tensor) -> Packed:
        if saved.untyped_storage().data_ptr() != self.weights.untyped_storage().data_ptr():
            return saved
        return self.mask, saved.shape, saved.stride(), int(saved.storage_offset())

    @staticmethod
    def _unpack(packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        mask, shape, stride, offset = packed
        return mask.view(torch.uint8).float().as_strided(shape, stride, offset)
