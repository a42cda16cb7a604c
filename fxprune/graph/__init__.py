"""The typed channel/kernel dataflow graph: lowered from a captured network, traversed by every objective."""

from fxprune.graph.ir import ChannelGraph, KernelSet, Space
from fxprune.graph.lower import lower

__all__ = ["ChannelGraph", "KernelSet", "Space", "lower"]
