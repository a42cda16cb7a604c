"""Lower a captured network to its channel/kernel dataflow graph."""

from fxprune.lowering.eager import graph_of_run
from fxprune.lowering.lower import lower
from fxprune.lowering.matrices import hidden_layers, matrices_outside
from fxprune.lowering.rules.table import Context, Rules, RuleTable, Unknown

__all__ = [
    "Context",
    "RuleTable",
    "Rules",
    "Unknown",
    "graph_of_run",
    "hidden_layers",
    "lower",
    "matrices_outside",
]
