"""The graph for people: text, short or whole, and networkx graphs of ops or of channels.

In: ops and kernel sets. Out: text, or a :class:`networkx.DiGraph`. Nothing here is needed for pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fxprune.graph.channel_sources import kernel_uses
from fxprune.graph.literals import SizeLiteral
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
    Window,
    refuse_kind,
)
from fxprune.graph.params import AxisUse, ParamUse

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["full_text", "summary", "to_networkx"]

LIMIT = 100_000  # edges that a channel-level export may have
LISTED = 16  # indices of a parameter's axis that the text lists in full


def summary(name: str, ops: Sequence[AnyOp], kernels: Mapping[str, KernelSet]) -> str:
    """One line per op, ``%7 = Kernel(%6) 2x64x56x56 layer1.0.conv1.weight 64x64x3x3``, and the totals.

    Constants are marked ``constant``; what has a bias or a floor is marked ``never Zero``.
    """
    lines = [_totals(name, ops, kernels)]
    for op in ops:
        lines.append(f"%{op.output.index} = {_call(op)} {_size(op.output.shape)} {_detail(op)}".rstrip())
    opaque = sum(isinstance(op, Opaque) for op in ops)
    if opaque:
        lines.append(f"{opaque} opaque: every input is taken to reach every output")
    return "\n".join(lines)


def _detail(op: AnyOp) -> str:
    match op:
        case Kernel():
            size = _size(op.weight.shape)
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


# -- everything ------------------------------------------------------------------------------------------
def full_text(
    name: str,
    ops: Sequence[AnyOp],
    kernels: Mapping[str, KernelSet],
    yields: Sequence[tuple[str, Value]],
) -> str:
    """Write every op, kernel set and node result on a line of its own.

    Two graphs of one network have the same text, so that a text may be stored and compared.

    Args:
        name: of the network.
        ops, kernels: of the lowered network.
        yields: what nodes yield, as pairs of a label and a value.
    """
    lines = [_totals(name, ops, kernels)]
    for op in ops:
        head = f"%{op.output.index} {_size(op.output.shape)}{'' if op.output.live else ' constant'}"
        place = f"at {op.node}{f'/{op.inner}' if op.inner else ''}{f' in {op.layer}' if op.layer else ''}"
        parts = [f"{head} = {_call(op)}", place, _content(op), ", ".join(map(_param, op.params))]
        lines.append(" | ".join(part for part in parts if part))
    for one in kernels.values():
        sides = f"{one.in_space.name}:{one.in_space.size} -> {one.out_space.name}:{one.out_space.size}"
        uses = f"{one.uses} use{'s' if one.uses > 1 else ''}, {one.macs} macs"
        details = _listed(
            ("transposed", one.transposed),
            (f"groups={one.groups}", one.groups > 1),
            (f"{_count(one.live_taps)} live taps", not bool(one.live_taps.all())),
            ("direct", one.direct),
            (f"also {', '.join(one.aliases)}", bool(one.aliases)),
        )
        lines.append(f"{one.name} {_size(one.shape)}: {sides}, {uses}{f', {details}' if details else ''}")
    lines += [f"{label} yields %{value.index} {_size(value.shape)}" for label, value in yields]
    return "\n".join(lines) + "\n"


def _content(op: AnyOp) -> str:
    """The fields of one kind of op, each that is not at its default."""
    match op:
        case Kernel(weight=weight):
            return _listed(
                (f"weight {weight.name or 'dense'} {_size(weight.shape)}", True),
                (f"view {weight.view}", weight.view is not None),
                ("direct", weight.direct),
                ("bias", op.bias),
                (f"groups={op.groups}", op.groups > 1),
                (_window(op.window), op.window is not None),
                (f"{_count(op.live_taps)} live taps", op.live_taps is not None),
            )
        case Source():
            return "" if op.pattern is None else f"{_count(op.pattern)} entries not Zero"
        case Pool():
            return _pool(op)
        case Mix():
            return op.equation or f"product {op.product}"
        case Opaque():
            return op.reason
        case Norm():
            return _listed(
                (f"statistics over {list(op.axes)}", bool(op.axes)),
                (f"groups={op.groups}", op.groups > 1),
                ("bias", op.bias),
                (f"eps={op.eps}", op.eps is not None),
            )
        case Affine():
            return "bias" if op.bias else ""
        case Map():
            return _listed(("floor", op.floor), (f"sums over {list(op.axes)}", bool(op.axes)))
        case Gather():
            pads = ", ".join(f"axis {axis} by {before} and {after}" for axis, before, after in op.pads)
            literals = ", ".join(map(_literal, op.literals))
            return _listed(
                (f"{op.move}: {op.index_map()}", True),
                (f"pads {pads}", bool(pads)),
                (f"literals {literals}", bool(literals)),
            )
        case Sum() | Gate() | Sink():
            return ""
        case _:
            refuse_kind(op)


def _pool(op: Pool) -> str:
    whole = f"{op.how} over {list(op.dims)}"
    if op.window is None:
        return _listed((whole, True), ("keepdim", op.keepdim))
    return _listed(
        (whole, True),
        (_window(op.window.window), op.window.window is not None),
        (f"own {op.window.own}", True),
        (f"total {op.window.total}", True),
        (f"periodic {op.window.periodic}", op.window.periodic is not None),
    )


def _literal(one: SizeLiteral) -> str:
    """``1.0=64 size of output.1`` for the number 64 in ``args[1][0]``."""
    return f"{'.'.join(map(str, one.place))}={one.value} {one.role} of {one.side}.{one.axis}"


def _param(use: ParamUse) -> str:
    axes = ", ".join(map(_axis, use.axes))
    return f"{use.name}[{axes}]" + (f" in {use.groups} groups" if use.groups > 1 else "")


def _axis(use: AxisUse | None) -> str:
    """``%3.1`` for axis 1 of value 3, ``%3.1,2`` for two; with the index where it is not the identity."""
    if use is None:
        return "-"
    text = f"%{use.value}.{','.join(map(str, use.axes))}"
    if use.index is None:
        return text
    return f"{text} at {list(use.index) if len(use.index) <= LISTED else f'<{len(use.index)} entries>'}"


def _window(window: Window | None) -> str:
    if window is None:
        return ""
    pads = ",".join(f"{before}+{after}" for before, after in window.padding)
    return _listed(
        (f"window {_size(window.kernel)}", True),
        (f"stride {_size(window.stride)}", set(window.stride) != {1}),
        (f"padding {pads} {window.mode}", any(map(any, window.padding))),
        (f"dilation {_size(window.dilation)}", set(window.dilation) != {1}),
        (f"output padding {_size(window.output_padding)}", any(window.output_padding)),
        ("transposed", window.transposed),
    )


def _listed(*parts: tuple[str, bool]) -> str:
    """The texts whose condition holds, with commas."""
    return ", ".join(text for text, holds in parts if holds)


def _totals(name: str, ops: Sequence[AnyOp], kernels: Mapping[str, KernelSet]) -> str:
    weights = sum(one.shape.numel() for one in kernels.values())
    return f"{name}: {len(ops)} ops, {len(kernels)} kernel sets, {weights} weights"


def _call(op: AnyOp) -> str:
    return f"{op.kind}({', '.join(f'%{value.index}' for value in op.inputs)})"


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "-"


def _count(pattern: Tensor | None) -> str:
    return "" if pattern is None else f"{int(pattern.sum())} of {pattern.numel()}"


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
            where a parameter is applied), an edge per value. ``"channel"``, for small graphs: a node
            ``(space, i)`` per channel that a kernel reads or makes, and for every kernel an edge from each
            channel that reaches its input, with its parameter (``kernel``) and ``[out, in]`` ``index``.
            Several kernels may join the same two channels (after a flatten): a ``MultiDiGraph``.

    Raises:
        ValueError: unknown level, or more than 100,000 edges at the channel level.
    """
    if level == "op":
        return _ops(name, ops)
    if level == "channel":
        return _channels(name, ops, kernels)
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


def _channels(name: str, ops: Sequence[AnyOp], sets: Mapping[str, KernelSet]) -> nx.MultiDiGraph:
    import networkx as nx

    result = nx.MultiDiGraph(name=name)
    _refuse_more(sum(one.shape[0] * one.shape[1] for one in sets.values()))
    for use in kernel_uses(ops, sets, sets.keys()):
        result.add_nodes_from(use.outputs)
        kernel = str(use.op.weight.name)
        columns = sets[kernel].shape[1]
        for row, column in (use.kernels >= 0).nonzero().tolist():
            index = divmod(int(use.kernels[row, column]), columns)
            for source in use.sources[use.input_of(row, column)]:
                result.add_edge(source, use.outputs[row], kernel=kernel, index=index)
            _refuse_more(result.number_of_edges())
    return result


def _refuse_more(count: int) -> None:
    if count > LIMIT:
        raise ValueError(f"level: the graph has {count:,} kernels, more than {LIMIT:,}; export level='op'")
