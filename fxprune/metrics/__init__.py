"""Questions about a network and its masks: a graph and masks come in, numbers go out, nothing is changed."""

from fxprune.metrics.counts import count_kernels, count_nodes, masked_macs
from fxprune.metrics.report import LayerReport, Report, measure

__all__ = ["LayerReport", "Report", "count_kernels", "count_nodes", "masked_macs", "measure"]
