"""Measure methods against sparsities: every cell of a grid once, in a folder that processes share."""

from fxprune.sweeps.grid import Results, read_results, sweep

__all__ = ["Results", "read_results", "sweep"]
