"""Look up what a user gives by layer: under its name, that of its parameter, or an fnmatch pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

__all__ = ["check_used", "entry_for", "value_for"]

_T = TypeVar("_T")


def entry_for(name: str, given: Mapping[str, object]) -> str | None:
    """Return the key of ``given`` that fits a parameter: its own or its module's name first, then a pattern.

    >>> entry_for("block.one.weight", {"block.*": 0.5, "block.one": 0.9})
    'block.one'
    """
    exact = [pattern for pattern in given if pattern in (name, name.rpartition(".")[0])]
    return next(iter(exact or [pattern for pattern in given if _fits(name, pattern)]), None)


def value_for(name: str, given: _T | Mapping[str, _T], usual: _T) -> _T:
    """Return the value for a parameter of one value for all, or of a mapping; ``usual`` if nothing fits.

    >>> value_for("block.one.weight", {"block.*": 0.5}, 1.0), value_for("head.weight", 0.9, 1.0)
    (0.5, 0.9)
    """
    if not isinstance(given, Mapping):
        return given
    entry = entry_for(name, given)
    return usual if entry is None else given[entry]


def check_used(argument: str, given: object, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for a pattern of a mapping that fits none of the parameters ``names``."""
    known = list(names)
    for pattern in given if isinstance(given, Mapping) else ():
        if not any(_fits(name, pattern) for name in known):
            raise ValueError(
                f"{argument}: {pattern!r} fits no prunable layer; layers are called like"
                f" {next(iter(known), 'nothing')!r}"
            )


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
