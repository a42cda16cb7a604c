"""The typed channel/kernel dataflow graph, which every objective, metric and report consumes.

In: ops and kernel sets, from lowering. Out: :class:`ChannelGraph`; the kinds of ops are those of
:mod:`fxprune.graph.ops`, under this roof as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, fx

from fxprune.graph import display
from fxprune.graph.channel_sources import ChannelName, input_channels, kernel_uses
from fxprune.graph.links import Link, links_of
from fxprune.graph.ops import (
    Affine,
    AnyOp,
    AxisUse,
    ConstantValue,
    Gate,
    Gather,
    Kernel,
    KernelSet,
    LinearOp,
    Map,
    Mix,
    Norm,
    Op,
    Opaque,
    ParamUse,
    Pool,
    Sink,
    SizeLiteral,
    Source,
    Space,
    Sum,
    Value,
    WeightRef,
    Window,
    WindowPool,
    refuse_kind,
)
from fxprune.graph.units import Units
from fxprune.graph.verify import verify
from fxprune.torch_private import pytree

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "Affine",
    "AnyOp",
    "AxisUse",
    "ChannelGraph",
    "ConstantValue",
    "Gate",
    "Gather",
    "Kernel",
    "KernelSet",
    "LinearOp",
    "Map",
    "Mix",
    "NodeOutput",
    "Norm",
    "Op",
    "Opaque",
    "ParamUse",
    "Pool",
    "Sink",
    "SizeLiteral",
    "Source",
    "Space",
    "Sum",
    "Value",
    "WeightRef",
    "Window",
    "WindowPool",
    "refuse_kind",
]


@dataclass(frozen=True)
class NodeOutput:
    """One tensor that a node yields: ``path`` leads to it through nested results, ``()`` to a tensor."""

    node: str
    path: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class ChannelGraph:
    """The lowered network: ``ops`` in execution order, one :class:`KernelSet` per prunable parameter.

    ``samples`` is the batch size of the example inputs that shapes were captured with; ``opaque`` lists the
    ops that no rule knew (their every input reaches their every output).

    ``results`` holds what every node of the captured graph that yields tensors yields, see :meth:`value_of`;
    ``constants`` describes those values that no op makes, by their index; ``units`` lists the hidden units of
    recurrent layers; ``training_outputs`` are values that the network gives in training alone: no path counts
    there, but they keep their shape. ``in_training`` says, by the index of a value, which one takes its place
    in training: no path counts there either, but both have the same channels. ``overwritten`` names those
    parameters that get other numbers in each call, whatever they held, so that a mask would have no effect,
    and the parameters that these numbers are computed from.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> gm = fxprune.capture(net, torch.ones(2, 4))
        >>> graph = fxprune.lower(gm)
        >>> first, relu, last = (node for node in gm.graph.nodes if node.op == "call_module")
        >>> graph.value_of(last).shape
        (2, 2)
        >>> graph.op_of(graph.value_of(last)).node == last.name
        True
        >>> graph.nodes_of(graph.value_of(first))  # ReLU passes every path: no op, the same value
        (NodeOutput(node='_0', path=()), NodeOutput(node='_1', path=()))
    """

    ops: tuple[AnyOp, ...]
    kernels: dict[str, KernelSet]
    samples: int
    name: str = "network"
    results: dict[str, Any] = field(default_factory=dict, repr=False)
    constants: dict[int, ConstantValue] = field(default_factory=dict, repr=False)
    units: tuple[Units, ...] = field(default=(), repr=False)
    training_outputs: tuple[Value, ...] = field(default=(), repr=False)
    in_training: dict[int, Value] = field(default_factory=dict, repr=False)
    overwritten: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    # Compiled traversals by resolution; see fxprune.paths.program.
    programs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    # -- from fx nodes to values and back ---------------------------------------------------------------
    def value_of(self, node: str | fx.Node) -> Any:
        """Return the value that a node of the captured graph yields.

        Args:
            node: a node of the graph that was lowered, or its name.

        Returns:
            A :class:`Value`; for a node that yields several tensors a tuple, list or dict (by key or by field
            name) of values, with ``None`` for members that are no tensors or that no node reads. A node that
            writes in place yields what it has written; its operand keeps the value from before.

        Raises:
            KeyError: there is no such node, or it yields no tensor.
        """
        name = node if isinstance(node, str) else node.name
        if name not in self.results:
            raise KeyError(f"node {name!r} is not in the graph or yields no tensor")
        return self.results[name]

    def nodes_of(self, value: Value) -> tuple[NodeOutput, ...]:
        """Return the nodes that yield ``value``, in execution order, with the place in what they yield.

        Empty for a value inside of a node: the scores of an attention, the inside of a leaf.
        """
        return self._nodes.get(value.index, ())

    def op_of(self, value: Value) -> AnyOp | None:
        """Return the op that makes ``value``; ``None`` for the values of ``constants``."""
        return self._makers.get(value.index)

    def in_both_modes(self, op: AnyOp) -> tuple[Value, ...]:
        """Return the inputs of an op, and the value that takes the place of its output in training."""
        other = self.in_training.get(op.output.index)
        return op.inputs if other is None else (*op.inputs, other)

    @cached_property
    def _nodes(self) -> dict[int, tuple[NodeOutput, ...]]:
        found: dict[int, tuple[NodeOutput, ...]] = {}
        for name, result in self.results.items():
            for path, value in _members(result, ()):
                found[value.index] = (*found.get(value.index, ()), NodeOutput(name, path))
        return found

    @cached_property
    def _makers(self) -> dict[int, AnyOp]:
        return {op.output.index: op for op in self.ops}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled traversals and what else is computed from the fields."""
        state = {one.name: getattr(self, one.name) for one in fields(self)}
        return state | {"programs": {}}

    def input_channels(self, name: str) -> tuple[tuple[ChannelName, ...], ...]:
        """Return, for every input channel of the kernel set ``name``, the channels that it comes from.

        A channel comes from all that reach it along paths without another kernel set in between: from
        several layers behind a residual sum, from the input of a skip connection as well. Of layers, channels
        are named; of the network's inputs (``%0``), a channel or feature, or where several axes tell entries
        apart their position. Elementwise functions, norms and softmaxes pass each entry on by itself. A use
        of the parameter as a transposed matrix reads no input channels, and is left out.

        Returns:
            A tuple of ``(space, channel)`` pairs per input channel, in execution order.

        Raises:
            KeyError: there is no such kernel set.

        Example:
            >>> import torch, fxprune
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(8, 1))
            >>> graph = fxprune.lower(fxprune.capture(net, torch.ones(1, 3, 2, 2)))
            >>> graph.input_channels("0.weight")
            ((('%0', 0),), (('%0', 1),), (('%0', 2),))
            >>> [channel for ((space, channel),) in graph.input_channels("2.weight")]
            [0, 0, 0, 0, 1, 1, 1, 1]
        """
        one = self.kernels[name]
        return input_channels(list(kernel_uses(self.ops, self.kernels, {name})), one)

    @property
    def opaque(self) -> tuple[Opaque, ...]:
        return tuple(op for op in self.ops if isinstance(op, Opaque))

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(kernels.shape.numel() for kernels in self.kernels.values())

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """One line of text per op, and the totals; see :func:`fxprune.graph.display.summary`."""
        return display.summary(self.name, self.ops, self.kernels)

    def text(self) -> str:
        """Write the whole graph, an op on each line; the same for every lowering of one network.

        An op's line holds its output with the shape, kind and inputs; the node and layer; the fields of its
        kind, for a :class:`Gather` the function, its index map and literals; and its parameters by axis,
        ``-`` for an axis that runs along no axis of a value.

        Example:
            >>> import torch, fxprune
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Flatten())
            >>> print(fxprune.lower(fxprune.capture(net, torch.ones(2, 3, 4))).text(), end="")
            Sequential: 4 ops, 1 kernel sets, 32 weights
            %0 2x3x4 = Source() | at input_1
            %1 2x3x8 = Kernel(%0) | at _0 in 0 | weight 0.weight 8x4 | 0.weight[%1.2, %0.2]
            %2 2x24 = Gather(%1) | at _1 in 1 | flatten(x0, 1, -1): x0[o0, o1 // 8, o1 % 8]
            %3 - = Sink(%2) | at output
            0.weight 8x4: %0:4 -> 0:8, 1 use, 96 macs
            input_1 yields %0 2x3x4
            _0 yields %1 2x3x8
            _1 yields %2 2x24
        """
        yields = [
            (node + "".join(f"[{step!r}]" for step in path), value)
            for node, result in self.results.items()
            for path, value in _members(result, ())
        ]
        return display.full_text(self.name, self.ops, self.kernels, yields)

    def links(self) -> list[Link]:
        """Return which entries of the axes of values and parameters go with one another, op by op.

        Example:
            >>> import torch, fxprune
            >>> graph = fxprune.lower(fxprune.capture(torch.nn.Linear(2, 3), torch.ones(1, 2)))
            >>> link = graph.links()[0]  # the rows of the weight, and the output's second axis
            >>> link.place, link.entries.tolist(), link.other, link.partners.tolist()
            ((1, 1), [0, 1, 2], ('weight', 0), [0, 1, 2])
        """
        return links_of(self.ops)

    def verify(self, gm: fx.GraphModule | None = None) -> None:
        """Check that the graph is whole; a pass that changes a graph calls this before it hands it on.

        Checked are the shapes, liveness and order of all values; the node of every op; the fields of every
        kind, index maps and literals among them; the parameters by axis; the kernel sets and their spaces;
        and what nodes yield. Index maps of large values are checked by their shapes alone.

        Args:
            gm: the captured network. With it the names of nodes and the shapes of what they yield, of all
                parameters and of all buffers are checked as well.

        Raises:
            ValueError: the first fault, with the op that has it.

        Example:
            >>> import torch, fxprune
            >>> from dataclasses import replace
            >>> gm = fxprune.capture(torch.nn.Linear(4, 8), torch.ones(2, 4))
            >>> graph = fxprune.lower(gm)
            >>> graph.verify(gm)
            >>> source, kernel, sink = graph.ops
            >>> replace(graph, ops=(source, sink)).verify()
            Traceback (most recent call last):
            ValueError: op %2 Sink (node 'output', layer ''): reads %1, which no op before it makes
        """
        values = {name: [value for _, value in _members(r, ())] for name, r in self.results.items()}
        constants = {index: one.value for index, one in self.constants.items()}
        if gm is None:
            verify(self.ops, self.kernels, values, constants)
            return
        shapes = {name: tuple(state.shape) for name, state in _state(gm)}
        nodes = {node.name: node for node in gm.graph.nodes}
        verify(self.ops, self.kernels, values, constants, shapes, nodes)
        for name, found in values.items():
            captured = [tuple(x.shape) for x in _tensors(nodes[name].meta["val"])] if name in nodes else []
            # A node that writes in place yields no tensor itself, and what it has written here.
            if captured and not {value.shape for value in found} <= set(captured):
                raise ValueError(f"node {name!r}: yields {[v.shape for v in found]}, captured as {captured}")

    def to_networkx(self, level: Literal["op", "channel"] = "op") -> nx.DiGraph:
        """The graph of ops, or of channels and kernels; see :func:`fxprune.graph.display.to_networkx`."""
        return display.to_networkx(self.name, self.ops, self.kernels, level)


def _state(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, by every name that they have."""
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def _tensors(val: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(val) if isinstance(leaf, Tensor)]


def _members(result: Any, path: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], Value]]:
    """Every value in a nested result, with the path to it."""
    if isinstance(result, Value):
        yield path, result
    elif isinstance(result, dict):
        for key, item in result.items():
            yield from _members(item, (*path, key))
    elif isinstance(result, (list, tuple)):
        for place, item in enumerate(result):
            yield from _members(item, (*path, place))
