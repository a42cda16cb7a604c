"""Measure how long networks take, side by side."""

from fxprune.latency.bench import bench, measure
from fxprune.latency.results import Bench, Network, Timing, sentence, size
from fxprune.latency.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "Bench", "Network", "Timing", "bench", "measure", "sentence", "size"]
