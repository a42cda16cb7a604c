"""Multiply the outputs of a lowered network by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fxprune.graph import ChannelGraph, ir
from fxprune.graph.tensor_function import PREVIOUS, TensorFunction
from fxprune.paths.scaled import Scaled

__all__ = ["WeightedOutputs"]


def _operand(
    _: torch.Tensor, weighted: WeightedOutputs, place: int, shape: tuple[int, ...], image: bool
) -> torch.Tensor:
    """The weight that multiplies the channels of an output by the numbers that are set for it."""
    numbers = weighted.numbers[place]
    return numbers.reshape(shape) if image else numbers.diag()


class WeightedOutputs:
    """``graph``: the network, with its outputs multiplied by one number per channel, ones until :meth:`set`.

    Channels are the last axis, or the second one of images.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.numbers: list[torch.Tensor] = []
        self.axes: list[int] = []
        index = 1 + max((op.output.index for op in graph.ops), default=0)
        ops: list[ir.AnyOp] = []
        for op in graph.ops:
            match op:
                case ir.Source() | ir.Kernel() | ir.Sum() | ir.Gate() | ir.Gather() | ir.Mix() | ir.Pool():
                    ops.append(op)
                case ir.Norm() | ir.Affine() | ir.Map() | ir.Opaque():
                    ops.append(op)
                case ir.Sink():
                    ops += self._scaled_outputs(op, index)
                case _:
                    ir.refuse_kind(op)
        self.graph = replace(graph, ops=tuple(ops), programs={})

    def _scaled_outputs(self, sink: ir.Sink, index: int) -> list[ir.AnyOp]:
        """Contractions of the outputs that have channels, with values from ``index`` on, and their sink."""
        ops: list[ir.AnyOp] = []
        outputs = []
        for value in sink.inputs:
            scaled = self._scaled(value, index + len(self.axes)) if value.shape[1:] else None
            ops += [scaled] if scaled else []
            outputs.append(scaled.output if scaled else value)
        return [*ops, replace(sink, inputs=tuple(outputs))]

    def set(self, activities: Sequence[Scaled[int]]) -> None:
        """Set the numbers to the sums of ``activities`` (of the outputs' shapes, without the batch).

        Only their ratios matter; all are at one power of two. Where some output is no tensor of the graph,
        all outputs count alike.
        """
        if len(activities) != len(self.axes):
            return
        sums = []
        for activity, axis in zip(activities, self.axes, strict=True):
            rest = [dim for dim in range(activity.values.dim()) if dim != axis]
            sums.append(activity.values.sum(rest) if rest else activity.values)
        top = max((float(each.max()) for each in sums), default=0.0)
        for place, each in enumerate(sums):
            self.numbers[place] = each.cpu() / top if top > 0 else torch.ones_like(each.cpu())

    def _scaled(self, value: ir.Value, index: int) -> ir.Kernel:
        """A contraction that multiplies the channels of ``value``: depthwise on images, else diagonal."""
        place, rank = len(self.axes), len(value.shape)
        image = rank > 3
        channels = value.shape[1 if image else -1]
        self.axes.append(0 if image else rank - 2)  # of the output without the batch
        self.numbers.append(torch.ones(channels))
        spots = rank - 2
        window = ir.Window((1,) * spots, (1,) * spots, ((0, 0),) * spots, (1,) * spots) if image else None
        shape = (channels, 1, *[1] * spots) if image else (channels, channels)
        view = TensorFunction.of(_operand, PREVIOUS, self, place, shape, image)
        return ir.Kernel(
            ir.Value(index, value.shape, value.live),
            (value,),
            "output",
            "output",
            weight=ir.WeightRef(None, shape, view),
            groups=channels if image else 1,
            window=window,
        )
