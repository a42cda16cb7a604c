"""Example inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["example_inputs_for"]


def example_inputs_for(
    model: nn.Module, example_inputs: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        return (torch.empty(2, *cfg["input_size"], device="meta"),), {}
    raise ValueError("example_inputs: pass a tensor, tuple or dict")
