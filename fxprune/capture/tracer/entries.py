"""Note what a trace has besides the nodes of its graph: calls of modules, decisions by numbers, types."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["Decision", "DtypeOf", "Scope"]


@dataclasses.dataclass(frozen=True)
class DtypeOf:
    """A type among a node's arguments that may have been read off the tensor which ``source`` computes."""

    source: fx.Node
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Scope:
    """One call of a module: where nodes were made. ``entries`` are its nodes and inner calls, in order."""

    path: str
    kind: type
    parent: Scope | None = None
    entries: list[Any] = dataclasses.field(default_factory=list, repr=False)

    @property
    def chain(self) -> list[str]:
        """The paths of the modules around, outermost first."""
        return [*(self.parent.chain if self.parent else ()), self.path]

    @functools.cached_property
    def stack(self) -> dict[str, tuple[str, type]]:
        """The modules around, as fx writes them into ``node.meta["nn_module_stack"]``."""
        outer = self.parent.stack if self.parent else {}
        return {**outer, self.path: (self.path, self.kind)} if self.path else outer


@dataclasses.dataclass(frozen=True)
class Decision:
    """The code of a module compared a number of the graph with another one, or a constant, and went on."""

    function: Callable[..., Any]
    node: fx.Node
    other: Any
    result: bool
    path: str
