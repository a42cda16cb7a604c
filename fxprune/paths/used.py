"""Find the rows and columns of parameters that paths use: what `reach` says of weights, without their number.

No tensor of the size of a parameter outlives the step that reads it: weights are held as bits, and their
derivatives are reduced to marks of rows and columns as they are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.graph import ir
from fxprune.paths.count import check_weights
from fxprune.paths.program import Resolution, compile_graph
from fxprune.paths.scaled import Tested
from fxprune.paths.traversal import EdgeWeights, Traversal

__all__ = ["Used", "used_channels"]

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
        used = ((gradient > 0.5) & ctx.mask).contiguous().view(torch.uint8)
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
        sizes = (kernels.out_space.size, kernels.in_space.size)
        rows, columns = (torch.ones(size, device=device, requires_grad=True) for size in sizes)
        gates[name] = rows, columns

    held = _HeldAsBits()

    def make(name: str) -> Tensor:
        kernels, mask = graph.kernels[name], masks.get(name)
        if mask is None:
            mask = torch.ones(kernels.shape, dtype=torch.bool, device=device)
        held.mask = mask.bool().contiguous()
        held.weights = _Channels.apply(*gates[name], held.mask, kernels)
        return held.weights

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        edges = EdgeWeights(graph, {}, torch.float32, device, rescale=False, make=make)
        total, _ = Traversal(program, Tested(device), edges).total()
        flat = [gate for pair in gates.values() for gate in pair]
        found: tuple[Tensor | None, ...] = (None,) * len(flat)
        if total.requires_grad:
            found = torch.autograd.grad(total, flat, allow_unused=True)
    marks = [
        torch.zeros(len(gate), dtype=torch.bool, device=device) if slope is None else slope > 0.5
        for gate, slope in zip(flat, found, strict=True)
    ]
    return dict(zip(gates, zip(marks[::2], marks[1::2], strict=True), strict=True))


Packed = Tensor | tuple[Tensor, torch.Size, tuple[int, ...], int]


class _HeldAsBits:
    """Lets the derivative hold the mask in the place of the ``weights`` that were made of it last."""

    def __init__(self) -> None:
        self.mask = self.weights = torch.zeros(0)

    def pack(self, saved: Tensor) -> Packed:
        if saved.untyped_storage().data_ptr() != self.weights.untyped_storage().data_ptr():
            return saved
        return self.mask, saved.shape, saved.stride(), int(saved.storage_offset())

    @staticmethod
    def unpack(packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        mask, shape, stride, offset = packed
        return mask.view(torch.uint8).float().as_strided(shape, stride, offset)
