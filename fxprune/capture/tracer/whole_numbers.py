"""``int(...)`` of numbers that remember where they came from.

Python makes a plain number in ``int(number)``, whatever the number says. In: the globals of the code that
does so. Out: for the time of a trace, an ``int`` among these globals that is ``int`` for every other purpose.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from fxprune.capture.tracer.traced_numbers import TracedFloat, TracedInt

__all__ = ["Namespaces", "follows_int"]

_HERE = __file__.rpartition("tracer")[0]


@dataclass
class Namespaces:
    """Hold the globals of code that calls ``int``: those that were met, and those that are to follow it.

    ``rounded``: whether code of theirs that is not followed made a whole number of a fraction, which may be
    the same for two sizes, and so looks like a constant.
    """

    met: dict[int, dict[str, Any]] = field(default_factory=dict)
    followed: list[dict[str, Any]] = field(default_factory=list)
    gave_up: bool = False
    rounded: bool = False

    def meet(self, number: TracedInt | TracedFloat) -> None:
        """Note where a plain number is made, if a name there is what makes it."""
        frame = sys._getframe(1)
        while _is_between(frame) and frame.f_back is not None:
            frame = frame.f_back
        names = frame.f_globals
        library = str(names.get("__name__", "")).partition(".")[0]
        if "int" in frame.f_code.co_names and "int" not in names and library != "torch":
            self.met[id(names)] = names
            self.rounded |= isinstance(number, TracedFloat) and not float.is_integer(number)

    def follow(self) -> bool:
        """Follow what was met since; whether there was anything."""
        known = {id(names) for names in self.followed}
        new = [] if self.gave_up else [names for key, names in self.met.items() if key not in known]
        self.followed += new
        self.rounded &= self.gave_up
        return bool(new)

    def give_up(self) -> bool:
        """Follow none from now on, as code does not run with it; whether any was followed."""
        known = bool(self.followed)
        self.met.update((id(names), names) for names in self.followed)
        self.followed, self.gave_up = [], self.gave_up or known
        return known


def _is_between(frame: FrameType) -> bool:
    """Whether code is of this package, or of NumPy, whose functions call what a number defines."""
    library = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return frame.f_code.co_filename.startswith(_HERE) or library == "numpy"


class _Kind(type):
    """Take the class for ``int``, as far as code can ask."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], TracedInt | TracedFloat):
            return args[0] if isinstance(args[0], TracedInt) else math.trunc(args[0])
        return int(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is int

    def __hash__(cls) -> int:
        return hash(int)


class _Int(int, metaclass=_Kind):
    """Stand in for ``int``; there are no instances."""


@contextmanager
def follows_int(namespaces: Iterable[dict[str, Any]]) -> Iterator[None]:
    """``int`` of a traced number is one, in the code that has these globals."""
    with ExitStack() as stack:
        for names in namespaces:
            names["int"] = _Int
            stack.callback(names.pop, "int", None)
        yield
