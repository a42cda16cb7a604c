"""Assignments to ``.data`` in a forward: those that change nothing, those of a weight made of itself, others.

In: the tape, the tensor and what is assigned. Out: nothing, a node that assigns, or the reason why there is
none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxprune.capture.errors import CaptureError, Overwritten
from fxprune.capture.tracer.spelling import called, changes_input
from fxprune.capture.tracer.tape import Tape

__all__ = ["assign_data_", "attributes_behind", "record_assignment"]

UNCHANGED = frozenset(("contiguous", "cpu", "cuda", "data", "detach", "float", "to", "type", "type_as"))
"""What gives a tensor itself, or its numbers, unless the type is another one."""


def assign_data_(tensor: Tensor, value: Tensor) -> Tensor:
    """Give a tensor the memory of another one, as ``tensor.data = value`` does; a node of graphs.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> assign_data_(weight, torch.zeros(2)) is weight, weight.tolist()
    (True, [0.0, 0.0])
    """
    tensor.data = value
    return tensor


def record_assignment(tape: Tape, tensor: Tensor, value: Tensor) -> None:
    """Record ``tensor.data = value``.

    A parameter that is computed from itself (a norm that is kept below a bound) is assigned in the graph, and
    read anew after that. Of one that is computed from others nothing is left of what it held: its module
    stays whole.

    Raises:
        CaptureError: there is no node for it.
        Overwritten: a parameter gets numbers that do not depend on its own.
    """
    own, new = tape.arg(tensor), tape.arg(value)
    same = value.shape == tensor.shape and value.dtype == tensor.dtype
    if same and _is_unchanged(own, new, tensor.dtype):
        return
    name = tape.names.get(id(tensor))
    if name is None or not same or not isinstance(own, fx.Node) or own.op != "get_attr":
        raise CaptureError("it assigns the .data of a tensor")
    if isinstance(new, fx.Node) and str(own.target) in attributes_behind(new):
        out = tape.shadows.of(tensor)
        tape.node("call_function", assign_data_, (tensor, value), {}).meta["val"] = out
        tape.forget(tensor)
    elif tape.values.reached:  # all of them are to be named
        tape.overwritten.append(name)
    else:
        raise Overwritten((name,))


def _is_unchanged(own: Any, new: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor's own memory is assigned to it: ``weight.data *= mask``, ``layer.to(type)``."""
    while isinstance(new, fx.Node) and new is not own and new.op.startswith("call"):
        name = new.args[1] if called(new) == "getattr" else called(new)
        if not (changes_input(new) or name in UNCHANGED):
            return False
        val = new.meta.get("val")
        if isinstance(val, Tensor) and val.dtype != dtype:  # rounded on the way
            return False
        new = new.args[0]
    return new is own


def attributes_behind(*nodes: fx.Node) -> list[str]:
    """Name the attributes of the network that values are computed from."""
    pending, seen = [*nodes], {*nodes}
    for node in pending:
        further = [source for source in node.all_input_nodes if source not in seen]
        seen.update(further)
        pending += further
    return list(dict.fromkeys(str(node.target) for node in pending if node.op == "get_attr"))
