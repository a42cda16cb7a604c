"""What can go wrong while a model is captured."""

from __future__ import annotations

__all__ = ["TRACE_ERRORS", "CaptureError"]


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
