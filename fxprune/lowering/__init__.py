"""Lower a captured network to its channel/kernel dataflow graph."""

from fxprune.lowering.lower import lower
from fxprune.lowering.matrices import matrices_outside
from fxprune.lowering.rules.table import Context, Rules, RuleTable, Unknown

__all__ = ["Context", "RuleTable", "Rules", "Unknown", "lower", "matrices_outside"]
