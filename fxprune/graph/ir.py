"""The typed channel/kernel dataflow graph, which every objective, metric and report consumes.

In: ops and kernel sets, from lowering. Out: :class:`ChannelGraph`; the kinds of ops are those of
:mod:`fxprune.graph.ops`, under this roof as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx

from fxprune.graph import display
from fxprune.graph.ops import (
    Affine,
    Gate,
    Gather,
    Kernel,
    KernelSet,
    Map,
    Mix,
    Op,
    Opaque,
    Pool,
    Sink,
    Source,
    Space,
    Sum,
    Value,
    WeightRef,
    Window,
    WindowPool,
)

__all__ = [
    "Affine",
    "ChannelGraph",
    "Gate",
    "Gather",
    "Kernel",
    "KernelSet",
    "Map",
    "Mix",
    "Op",
    "Opaque",
    "Pool",
    "Sink",
    "Source",
    "Space",
    "Sum",
    "Value",
    "WeightRef",
    "Window",
    "WindowPool",
]


@dataclass(frozen=True)
class ChannelGraph:
    """The lowered network: ``ops`` in execution order, one :class:`KernelSet` per prunable parameter.

    ``samples`` is the batch size of the example inputs that shapes were captured with; ``opaque`` lists the
    ops that no rule knew (their every input reaches their every output).
    """

    ops: tuple[Op, ...]
    kernels: dict[str, KernelSet]
    samples: int
    name: str = "network"
    # Compiled traversals by resolution; see fxprune.paths.program.
    programs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def opaque(self) -> tuple[Opaque, ...]:
        return tuple(op for op in self.ops if isinstance(op, Opaque))

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(kernels.shape.numel() for kernels in self.kernels.values())

    def summary(self) -> str:
        """One line of text per op, and the totals; see :func:`fxprune.graph.display.summary`."""
        return display.summary(self.name, self.ops, self.kernels)

    def to_networkx(self, level: Literal["op", "channel"] = "op") -> nx.DiGraph:
        """The graph of ops, or of channels and kernels; see :func:`fxprune.graph.display.to_networkx`."""
        return display.to_networkx(self.name, self.ops, self.kernels, level)
