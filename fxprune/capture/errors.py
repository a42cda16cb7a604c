"""What can go wrong while a model is captured."""

from __future__ import annotations

__all__ = ["TRACE_ERRORS", "CaptureError", "first_line"]


class CaptureError(RuntimeError):
    """A model, or one module of it, cannot be captured as a graph."""


# What a forward function may raise because it is being traced, or because its inputs do not fit.
TRACE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def first_line(error: BaseException) -> str:
    """What an error says, without the page that some of PyTorch's append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
