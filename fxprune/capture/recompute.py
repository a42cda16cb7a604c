"""Keep activation checkpointing in the code of a captured graph.

Nodes that the model ran under ``torch.utils.checkpoint`` say so in ``node.meta["checkpoint"]``. The graph
itself stays flat, so that passes see every operation; in its code the lines of a region become a function
that is called through ``torch.utils.checkpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

__all__ = ["OpenRegions", "Region", "keep_regions"]

ASSIGNED = re.compile(r"^(\w+)(?: : [^=]+)? = ")
FREED = re.compile(r";  ((?:\w+ = )+)None$")
TEXT = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


@dataclass(frozen=True)
class Region:
    """One call of ``torch.utils.checkpoint``; ``training``: the model makes it in training mode alone."""

    number: int
    training: bool = False


class OpenRegions:
    """The regions that code under a trace is in, outermost first; what is inside of one is part of it."""

    def __init__(self) -> None:
        self.keys: list[object] = []
        self.number = 0

    @property
    def current(self) -> Region | None:
        """The region that a node made now belongs to."""
        return Region(self.number) if self.keys else None

    def begin(self, key: object) -> None:
        """Enter a region; ``key`` is any object that its end will name."""
        self.number += not self.keys
        self.keys.append(key)

    def end(self, key: object) -> None:
        """Leave a region, if it was not forgotten with the part of the trace in which it began."""
        if any(one is key for one in self.keys):
            while self.keys.pop() is not key:
                pass


def keep_regions(graph: fx.Graph) -> None:
    """Write the code of ``graph``, from now on, with the regions that its nodes name."""
    regions = {node.name: node.meta["checkpoint"] for node in graph.nodes if "checkpoint" in node.meta}
    if regions:
        arguments = [node.name for node in graph.nodes if node.op == "placeholder"]
        graph.on_generate_code(lambda _: _Rewriting(regions, arguments))


@dataclass
class _Rewriting:
    """Rewrites the body of a graph's code. ``regions``: by the name of a node."""

    regions: dict[str, Region]
    arguments: list[str]

    def __call__(self, body: list[str]) -> list[str]:
        lines = "".join(body).split("\n")
        for region in dict.fromkeys(self.regions.values()):
            own = [i for i, line in enumerate(lines) if self.regions.get(_assigned(line)) == region]
            if own:
                first, end = own[0], own[-1] + 1
                before = [*self.arguments, *map(_assigned, lines[:first])]
                lines[first:end] = _as_function(region, before, lines[first:end], lines[end:])
        return ["\n".join(lines)]


def _as_function(region: Region, before: list[str], inside: list[str], after: list[str]) -> list[str]:
    """The lines of a function that does what is ``inside``, and of its calls.

    ``before``: the names that are known there. All that is read is passed: the caller may drop its own.
    """
    made = {name for line in inside if (name := _assigned(line))}
    read = {name for line in inside for name in _read(line)}
    kept = {name for line in after for name in _read(line)}
    given = [name for name in dict.fromkeys(before) if name in read - made]
    results = "".join(f"{name}, " for name in sorted(made & kept))
    freed = [name for line in inside for name in _freed(line) if name in given]
    function = f"_checkpointed_{region.number}"
    passed = ", ".join((function, *given))
    condition = "torch.is_grad_enabled()" + (" and self.training" if region.training else "")
    return [
        f"def {function}({', '.join(given)}):",
        *(f"    {_without_other_frees(line, made | set(given))}" for line in inside),
        f"    return ({results})",
        f"if {condition}:",
        f"    _results = torch.utils.checkpoint.checkpoint({passed}, use_reentrant=False)",
        "else:",
        f"    _results = {function}({', '.join(given)})",
        f"({results}) = _results;  " + "".join(f"{name} = " for name in (*freed, "_results")) + "None",
    ]


def _assigned(line: str) -> str:
    match = ASSIGNED.match(line)
    return match[1] if match else ""


def _freed(line: str) -> list[str]:
    match = FREED.search(line)
    return match[1].replace(" = ", " ").split() if match else []


def _read(line: str) -> list[str]:
    """The names on the right of an assignment, or in a statement without one."""
    return NAME.findall(TEXT.sub("", ASSIGNED.sub("", FREED.sub("", line))))


def _without_other_frees(line: str, own: Iterable[str]) -> str:
    names = [name for name in _freed(line) if name in own]
    return FREED.sub("", line) + (";  " + "".join(f"{name} = " for name in names) + "None" if names else "")
