"""The forward of a user's autograd function, as a module whose code can be looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxprune.capture.errors import CaptureError

__all__ = ["FunctionBody"]


class FunctionBody(nn.Module):
    """Runs the forward of ``function_class`` without what it keeps for its gradient.

    >>> class Twice(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return 2 * x
    >>> FunctionBody(Twice)(torch.ones(2))
    tensor([2., 2.])
    """

    def __init__(self, function_class: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function_class = function_class

    def forward(self, *args: Any) -> Any:
        kind: Any = self.function_class
        if kind.setup_context is not torch.autograd.Function.setup_context:
            return kind.forward(*args)  # what it keeps is kept elsewhere
        return kind.forward(_Context((True,) * len(args)), *args)


class _Context:
    """Take what a forward keeps, and forget it."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Any) -> None: ...

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_dirty(self, *tensors: Any) -> None:
        raise CaptureError("it changes its arguments in place")
