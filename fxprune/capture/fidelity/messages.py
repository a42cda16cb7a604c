"""Words for what a graph does not do, and why modules stay whole."""

from __future__ import annotations

__all__ = ["COUNTS_BATCH", "COUNTS_VALUES", "INSTEAD", "IN_TRAINING", "NOT_RUN", "ONE_BATCH_SIZE"]

IN_TRAINING = " in training; the graph does not"
NOT_RUN = (
    "changes nothing in the graph and does not run with it, for the graph does not call this module; "
    "register it on one that it calls"
)
INSTEAD = "prune with returns='module', which trains as the model does"
COUNTS_VALUES = "it makes a Python number of the numbers in a tensor (by an index, len or range)"
COUNTS_BATCH = "it makes a Python number of the batch size (int, range or iteration)"
ONE_BATCH_SIZE = f"{COUNTS_BATCH}; the graph holds for the batch size of example_inputs"
