"""Numbers among the arguments of a data movement that depend on the sizes of axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Role", "SizeLiteral"]

Role = Literal["size", "start", "stop", "index", "parts"]


@dataclass(frozen=True)
class SizeLiteral:
    """A number among a node's arguments that has to change when an axis gets longer or shorter.

    ``place`` leads to it: a position in ``node.args``, or the name of a keyword argument or, for a module, of
    its attribute; then the position in a list or tuple; then ``"start"`` or ``"stop"`` in a slice. ``value``
    is the number as written. ``side`` and ``axis`` name the axis, of the op's first input or of its output,
    and ``role`` what the number is there:

    =========  ====================================================================================
    size       the axis's size; for ``split`` into equal parts that of every part but the last
    start      the first position taken; negative numbers count from the end
    stop       the position after the last one
    index      the only position taken
    parts      how many parts the axis is cut into
    =========  ====================================================================================
    """

    place: tuple[int | str, ...]
    value: int
    role: Role
    side: Literal["input", "output"]
    axis: int
