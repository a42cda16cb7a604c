"""Questions about a network and its masks: a graph and masks come in, numbers go out, nothing is changed."""

from fxprune.metrics.report import LayerReport, ProductReport, Report, listed, measure

__all__ = ["LayerReport", "ProductReport", "Report", "listed", "measure"]
