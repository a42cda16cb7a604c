"""Find what a module carries over from one call to the next, which a graph in its place would not.

A table that is made for the size of the inputs, and anew for another size, is nothing of that kind: the graph
computes it each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.capture.fidelity.compare import computes_same_apart_from_order
from fxprune.capture.fidelity.other_inputs import Inputs
from fxprune.capture.tracer.meta_values import map_structure
from fxprune.capture.tracer.trace import Trace

__all__ = ["carried_over", "larger_inputs"]

LARGER = 4
"""Times; a square number, for modules that take tokens for an image that is a square."""


def carried_over(base: Trace, attempt: Callable[..., Trace | None], inputs: Inputs) -> str:
    """Say what a module computes with, in evaluation, that an earlier run of it wrote; "" if nothing.

    ``base``: a trace in evaluation. ``attempt`` makes others, or returns None. Where training cannot be
    traced nothing is known of what it writes.
    """
    if "" in base.changed:
        told = f"it computes with its attribute {base.changed['']!r}, which it writes"
        after = attempt(rehearsed=False, sizes=True)
        if after is None or not computes_same_apart_from_order(base, after):
            return told
        for larger in larger_inputs(inputs):
            fresh = attempt(given=larger)
            after = attempt(rehearsed=False, sizes=True, given=larger) if fresh else None
            if fresh and not (after and computes_same_apart_from_order(fresh, after)):
                return told
    trained = attempt(rehearsed=True, sizes=True)
    if trained and not computes_same_apart_from_order(base, trained):
        return "it computes with an attribute that it writes in training"
    return ""


def larger_inputs(inputs: Inputs) -> list[Inputs]:
    """Return the inputs with one dimension larger, each in turn, in all tensors that have it."""
    ranks: list[int] = []
    given = inputs.args, dict(inputs.kwargs)
    map_structure(lambda x: ranks.append(x.dim()) if isinstance(x, Tensor) else None, given)

    def change(value: object, dim: int) -> object:
        if not isinstance(value, Tensor) or value.dim() <= dim:
            return value
        shape = [size * LARGER if place == dim else size for place, size in enumerate(value.shape)]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    changes = [functools.partial(change, dim=dim) for dim in range(max(ranks, default=0))]
    return [Inputs(*(map_structure(one, part) for part in given)) for one in changes]
