"""A module around a model: where the model's own forward cannot be traced, it is called as a whole.

What is inside is looked at as inside of any part that stays whole. The parts of the model are called
``model.…`` in the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["PREFIX", "Shell", "calls_whole", "in_shell", "renamed"]

PREFIX = "model."
Value = TypeVar("Value")


class Shell(nn.Module):
    """Calls a model.

    Example:
        >>> import torch
        >>> shell = Shell(nn.Linear(4, 2))
        >>> shell(torch.ones(3, 4)).shape, [name for name, _ in shell.named_parameters()]
        (torch.Size([3, 2]), ['model.weight', 'model.bias'])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def in_shell(model: nn.Module) -> Shell:
    """Put a model into a shell, whose class has the name of the model's, and the arguments of its forward.

    >>> type(in_shell(nn.Linear(4, 2))).__name__
    'Linear'
    """

    signature = inspect.signature(type(model).forward)

    def forward(self: Shell, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self.model, *args, **kwargs)
        given.apply_defaults()  # one call, however the arguments are given
        return self.model(*given.args[1:], **given.kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    kind: type[Shell] = type(type(model).__name__, (Shell,), {"__module__": __name__, "forward": forward})
    return kind(model)


def calls_whole(network: nn.Module, model: nn.Module) -> bool:
    """Whether the graph that was captured of ``model`` calls it as a whole, by other names."""
    return network is not model and bool(vars(network).get("in_shell", False))


def renamed(names: Mapping[str, Value]) -> dict[str, Value]:
    """Give the parts of a model the names that they have in a shell.

    >>> renamed({"fc.weight": 1})
    {'model.fc.weight': 1}
    """
    return {PREFIX + name: value for name, value in names.items()}
