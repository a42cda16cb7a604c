"""Name the modules in which traces differ or write, by their paths in the model."""

from __future__ import annotations

from fxprune.capture.tracer.trace import Trace

__all__ = ["inside", "related", "writers"]


def related(a: str, b: str) -> bool:
    """Tell whether one of two modules contains the other."""
    return not a or not b or f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def inside(path: str, called: set[str]) -> bool:
    """Tell whether a module is in one that is called as a whole."""
    atoms = path.split(".")
    return any(".".join(atoms[:i]) in called for i in range(1, len(atoms)))


def writers(found: Trace, more: str = "") -> dict[str, str]:
    """Say why modules stay whole; ``more`` is added for the model itself, which becomes a graph."""
    return {
        path: f"its forward writes its attribute {name!r}{'' if path else more}"
        for path, name in found.changed.items()
    }
