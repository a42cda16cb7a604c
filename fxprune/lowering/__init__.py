"""Lower a captured network to its channel/kernel dataflow graph."""

from fxprune.lowering.lower import lower

__all__ = ["lower"]
