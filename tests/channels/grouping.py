"""Small networks written as functions, and the groups of their channels as plain lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprune.capture import capture
from fxprune.channels.groups import Groups, group_channels
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower


class Net(nn.Module):
    """A network of named layers, with `forward(net, *inputs)` as its forward."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def graph_of(model: nn.Module, inputs: Any) -> ChannelGraph:
    return lower(capture(model, inputs))


def groups_of(model: nn.Module, inputs: Any, **options: Any) -> Groups:
    return group_channels(graph_of(model, inputs), **options)


def tables(groups: Groups) -> dict[str, list[int]]:
    """The groups of the rows of every layer, under its name, and of its columns, under `name.in`."""
    rows = {name.removesuffix(".weight"): numbers.tolist() for name, numbers in groups.rows.items()}
    columns = {f"{name.removesuffix('.weight')}.in": own.tolist() for name, own in groups.columns.items()}
    return rows | columns
