"""Capture: any model as a ``torch.fx.GraphModule`` with shapes on every node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.errors import TRACE_ERRORS, CaptureError
from fxprune.capture.inputs import example_inputs_for
from fxprune.capture.shadows import map_structure, meta_like
from fxprune.capture.trace import Trace, remove_dead_code, trace

__all__ = ["capture", "capture_leaf"]


def capture(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    args, kwargs = example_inputs_for(model, example_inputs)
    args, kwargs = _to_meta(args), _to_meta(kwargs)
    found = trace(model, args, kwargs, training=False)
    remove_dead_code(found.graph)
    return _module(model, found)


def capture_leaf(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.GraphModule:
    try:
        found = trace(module, _to_meta(tuple(args)), _to_meta(dict(kwargs)), training=False)
    except TRACE_ERRORS as error:
        raise CaptureError(f"{type(module).__qualname__}: {error}") from error
    remove_dead_code(found.graph)
    return _module(module, found)


def _to_meta(value: Any) -> Any:
    return map_structure(lambda x: meta_like(x) if isinstance(x, Tensor) else x, value)


def _module(model: nn.Module, found: Trace) -> fx.GraphModule:
    skeleton = nn.Module()
    skeleton._parameters, skeleton._buffers, skeleton._modules = (
        dict(model._parameters),
        dict(model._buffers),
        dict(model._modules),
    )
    for name, value in vars(model).items():
        if isinstance(value, Tensor):
            object.__setattr__(skeleton, name, value)
    skeleton._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
    skeleton.training = model.training
    for name, value in found.constants.items():
        skeleton.register_buffer(name, value, persistent=False)
    gm = fx.GraphModule(skeleton, found.graph, type(model).__name__)
    gm._parameters, gm._buffers, gm._modules = skeleton._parameters, skeleton._buffers, skeleton._modules
    gm._non_persistent_buffers_set = skeleton._non_persistent_buffers_set
    gm.graph.lint()
    return gm
