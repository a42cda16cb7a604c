"""The graph for people: a text dump, and networkx graphs of ops or of channels.

In: ops and kernel sets. Out: text, or a :class:`networkx.DiGraph`. Nothing here is needed for pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

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
    refuse_kind,
)

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["summary", "to_networkx"]

LIMIT = 100_000  # kernels that a channel-level export may have


def summary(name: str, ops: Sequence[AnyOp], kernels: Mapping[str, KernelSet]) -> str:
    """One line per op, ``%7 = Kernel(%6) 2x64x56x56 layer1.0.conv1.weight 64x64x3x3``, and the totals.

    Constants are marked ``constant``; what has a bias or a floor is marked ``never Zero``.
    """
    weights = sum(one.shape.numel() for one in kernels.values())
    lines = [f"{name}: {len(ops)} ops, {len(kernels)} kernel sets, {weights} weights"]
    for op in ops:
        inputs = ", ".join(f"%{value.index}" for value in op.inputs)
        shape = "x".join(map(str, op.output.shape)) or "-"
        line = f"%{op.output.index} = {op.kind}({inputs}) {shape} {_detail(op)}".rstrip()
        lines.append(line)
    opaque = sum(isinstance(op, Opaque) for op in ops)
    if opaque:
        lines.append(f"{opaque} opaque: every input is taken to reach every output")
    return "\n".join(lines)


def _detail(op: AnyOp) -> str:
    match op:
        case Kernel():
            size = "x".join(map(str, op.weight.shape))
            groups = f" groups={op.groups}" if op.groups > 1 else ""
            return f"{op.weight.name or 'dense'} {size}{groups}{' +bias' if op.bias else ''}"
        case Source():
            return "" if op.output.live else "constant" if op.pattern is None else "constant with zeros"
        case Pool():
            return f"{op.how} over {'windows of ' if op.window else ''}{list(op.dims)}"
        case Mix():
            return op.equation or "of full tensors"
        case Opaque():
            return op.reason
        case Norm():
            groups = f" in {op.groups} groups" if op.groups > 1 else ""
            return f"over {list(op.axes)}{groups}{' +bias' if op.bias else ''}"
        case Affine():
            return "never Zero" if op.bias else ""
        case Map():
            return "never Zero" if op.floor else ""
        case Sum() | Gate() | Gather() | Sink():
            return ""
        case _:
            refuse_kind(op)


def to_networkx(
    name: str,
    ops: Sequence[AnyOp],
    kernels: Mapping[str, KernelSet],
    level: Literal["op", "channel"] = "op",
) -> nx.DiGraph:
    """The graph in networkx's form.

    Args:
        name: of the network.
        ops, kernels: of the lowered network.
        level: ``"op"``: a node per op (attributes ``kind``, ``node``, ``layer``, ``shape``, and ``kernel``
        where a
            parameter is applied), an edge per value. ``"channel"``: a node ``(space, i)`` per channel of the
            spaces that kernels join, an edge per kernel with its parameter and ``[out, in]`` index; for small
            graphs.

    Raises:
        ValueError: unknown level, or more than 100,000 kernels at the channel level.
    """
    if level == "op":
        return _ops(name, ops)
    if level == "channel":
        return _channels(name, kernels)
    raise ValueError(f"level: expected 'op' or 'channel', got {level!r}")


def _ops(name: str, ops: Sequence[AnyOp]) -> nx.DiGraph:
    import networkx as nx

    result = nx.DiGraph(name=name)
    for op in ops:
        kernel = op.weight.name if isinstance(op, Kernel) else None
        result.add_node(
            op.output.index,
            kind=op.kind,
            node=op.node,
            layer=op.layer,
            shape=op.output.shape,
            kernel=kernel,
        )
        result.add_edges_from((value.index, op.output.index) for value in op.inputs)
    return result


def _channels(name: str, sets: Mapping[str, KernelSet]) -> nx.DiGraph:
    import networkx as nx

    count = sum(kernels.shape[0] * kernels.shape[1] for kernels in sets.values())
    if count > LIMIT:
        raise ValueError(f"level: the graph has {count:,} kernels, more than {LIMIT:,}; export level='op'")
    result = nx.DiGraph(name=name)
    for kernels in sets.values():
        per_group_in = kernels.in_space.size // kernels.groups
        per_group_out = kernels.out_space.size // kernels.groups
        for group in range(kernels.groups):
            pairs = torch.cartesian_prod(torch.arange(per_group_out), torch.arange(per_group_in)).tolist()
            for o, i in pairs:
                out, into = group * per_group_out + o, group * per_group_in + i
                index = (into, o) if kernels.transposed else (out, i)
                result.add_edge(
                    (kernels.in_space.name, into),
                    (kernels.out_space.name, out),
                    kernel=kernels.name,
                    index=index,
                )
    return result
