"""Rewrite a pruned network as a smaller one with the same outputs."""

from fxprune.rewrite.compact.compaction import compact
from fxprune.rewrite.compact.optimizer import remap_optimizer
from fxprune.rewrite.compact.table import CompactedLayer, Compaction

__all__ = ["CompactedLayer", "Compaction", "compact", "remap_optimizer"]
