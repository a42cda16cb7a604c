"""Find the contractions of a network that have no prunable weight, and count their multiply-adds.

Products of two values are such (the two of an attention), and convolutions with fixed or computed weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from fxprune.channels.counts import dense_macs
from fxprune.graph import ChannelGraph, ir
from fxprune.paths.terms import has_no_parameter

__all__ = ["UnprunedContraction", "contractions"]


@dataclass(frozen=True)
class UnprunedContraction:
    """Contractions that make up one thing: the two products of an attention, or one alone.

    ``name`` is the module that holds the layers which feed it, else the first node; ``macs`` are the
    multiply-adds for one sample of the dense network.
    """

    name: str
    ops: tuple[ir.AnyOp, ...]
    macs: int


def contractions(graph: ChannelGraph) -> tuple[UnprunedContraction, ...]:
    """Return the contractions without a prunable weight, in execution order.

    Products are of one attention if the result of one reaches the other without a layer in between.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(1, 5, 8)))
        >>> [(one.name, len(one.ops), one.macs) for one in contractions(graph)]
        [('self_attn', 2, 400)]
    """
    groups: list[list[ir.AnyOp]] = []
    reaching: dict[int, list[ir.AnyOp]] = {}  # value -> the group whose result reaches it, without a layer
    for op in graph.ops:
        if isinstance(op, ir.Kernel) and op.weight.name is not None:
            continue
        group = next((reaching[value.index] for value in op.inputs if value.index in reaching), None)
        if has_no_parameter(op) and op.output.live:
            if group is None or not isinstance(op, ir.Mix):
                group = []
                groups.append(group)
            group.append(op)
        if group is not None:
            reaching[op.output.index] = group
    layers = _feeding_layers(graph)
    names = [_name(group[0], layers[group[0].output.index]) for group in groups]
    return tuple(
        UnprunedContraction(
            name if names.count(name) == 1 else f"{name} ({group[0].node})",
            tuple(group),
            sum(dense_macs(op, graph.samples) for op in group),
        )
        for name, group in zip(names, groups, strict=True)
    )


def _feeding_layers(graph: ChannelGraph) -> dict[int, frozenset[str]]:
    """By value, the modules whose weights it was last multiplied with."""
    found: dict[int, frozenset[str]] = {}
    for op in graph.ops:
        if isinstance(op, ir.Kernel) and op.weight.name is not None:
            found[op.output.index] = frozenset({graph.kernels[op.weight.name].owner})
        else:
            found[op.output.index] = frozenset().union(*(found[value.index] for value in op.inputs))
    return found


def _name(op: ir.AnyOp, layers: frozenset[str]) -> str:
    """The module that holds the layers (that of attention holds its projections), else the node."""
    if op.layer:
        return op.layer
    paths = [layer.split(".")[:-1] for layer in layers]
    alike = takewhile(lambda atoms: len(set(atoms)) == 1, zip(*paths, strict=False))
    return ".".join(atoms[0] for atoms in alike) or op.node
