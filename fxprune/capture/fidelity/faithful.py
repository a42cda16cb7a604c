"""Hold a graph that is right for a model, and what is to be said about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxprune.capture.hooks import Hook

__all__ = ["Faithful"]


@dataclass
class Faithful:
    """The graph, what it needs besides the model's own modules, what the user should know, and the hooks that
    were left out of the graph.

    ``limit`` and ``carried``: why the graph cannot take the model's place in a larger graph, if it cannot: it
    holds for some sizes only, or computes with what an earlier call wrote.
    """

    graph: fx.Graph
    extra: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    kept_hooks: frozenset[Hook] = frozenset()
    limit: str = ""
    carried: str = ""
