"""Questions about a network and its masks: a graph and masks come in, numbers go out, nothing is changed."""

from fxprune.metrics.report import LayerReport, ProductReport, Report, measure

__all__ = ["LayerReport", "ProductReport", "Report", "measure"]
