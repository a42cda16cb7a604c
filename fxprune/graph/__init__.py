"""The typed channel/kernel dataflow graph: its ops, its values, and how it is shown."""

from fxprune.graph.ir import ChannelGraph, KernelSet, Space

__all__ = ["ChannelGraph", "KernelSet", "Space"]
