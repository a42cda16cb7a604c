"""Take a model's example inputs from data, and explain data that a model does not take."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.capture.inputs import example_inputs_for
from fxprune.scoring.forms import check_batch, inputs_and_labels, is_batch, iterate, tensors_in

__all__ = ["FAULTS", "explain_misfit", "inputs_of"]

FAULTS = (RuntimeError, TypeError, ValueError, AssertionError, IndexError)
"""Errors that inputs of a wrong shape or type can end in."""

Expected = tuple[torch.dtype, tuple[int | None, ...]]
"""The type and the shape of a tensor, None for sizes that are free."""


def inputs_of(data: Any, model: nn.Module) -> tuple[Any, Any]:
    """Return example inputs for ``model``, as the first batch of ``data`` has them, and the data to use.

    The inputs stand on the device of the model's parameters, and have their type where both are of floating
    point. An iterator is returned with its first batch put back.

    Raises ``TypeError`` or ``ValueError`` for data in no known form, and for a mapping without what the
    model's ``forward`` asks for.

    >>> inputs, _ = inputs_of((torch.ones(4, 3, dtype=torch.float64), torch.zeros(4)), nn.Linear(3, 2))
    >>> inputs.shape, inputs.dtype
    (torch.Size([4, 3]), torch.float32)
    """
    batch, data = _first(data)
    check_batch(batch, "batch 0 of data")
    inputs = _arguments(batch, model) if isinstance(batch, Mapping) else inputs_and_labels(batch)[0]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    return _moved(dict(inputs) if isinstance(inputs, Mapping) else inputs, like), data


def _first(data: Any) -> tuple[Any, Any]:
    """Return the first batch, and data that begin with it again."""
    if is_batch(data):
        return data, data
    generator = getattr(data, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    batches = iterate(data, "")
    batch = next(batches, None)
    if generator is not None and state is not None:
        generator.set_state(state)
    if batch is None:
        raise ValueError("data yields no batch; expected a pair (x, y), or an iterable of such batches")
    return batch, itertools.chain([batch], batches) if isinstance(data, Iterator) else data


def _arguments(batch: Mapping[Any, Any], model: nn.Module) -> dict[str, Any]:
    """Take what ``forward`` has an argument for out of a mapping of the caller's."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in batch]
    if missing:
        raise ValueError(
            f"data: its batches are mappings of {', '.join(map(str, batch))}, forward of"
            f" {type(model).__name__} asks for {missing[0]!r}; pass example_inputs"
        )
    return {p.name: batch[p.name] for p in named if p.name in batch}


def _moved(value: Any, like: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _moved(part, like) for key, part in value.items()}
    return tuple(_moved(part, like) for part in value) if isinstance(value, tuple) else value


def explain_misfit(inputs: Any, model: nn.Module) -> str | None:
    """Say what is wrong with inputs that ``model`` failed on, and the remedy; None where they look right.

    The model takes what it was captured with, what it says itself (timm, torchvision), or else what its first
    layer reads.

    >>> explain_misfit(torch.ones(2, 8, 8, 3), nn.Conv2d(3, 4, 3))
    'data: x is float32 of (2, 8, 8, 3), Conv2d takes float32 of (N, 3, H, W): pass x.permute(0, 3, 1, 2)'
    """
    given = list(tensors_in(inputs))
    wanted = _expected(model)
    if len(given) != len(wanted):
        captured = isinstance(getattr(model, "graph", None), torch.fx.Graph)
        if not captured or (len(wanted) < 2 and len(given) < 2):
            return None  # a first layer does not say how many inputs there are
        return f"data: x holds {len(given)} tensors, {type(model).__name__} takes {len(wanted)}"
    for index, (x, (dtype, shape)) in enumerate(zip(given, wanted, strict=True)):
        remedy = _remedy(x, dtype, shape)
        if remedy is not None:
            name = "x" if len(given) == 1 else f"input {index}"
            return (
                f"data: {name} is {_kind(x.dtype)} of {_tuple(x.shape)}, {type(model).__name__} takes"
                f" {_kind(dtype)} of {_tuple(('N', *_letters(shape[1:])))}: {remedy}"
            )
    return None


def _expected(model: nn.Module) -> list[Expected]:
    """The tensors that a model takes, the first size free."""
    graph = getattr(model, "graph", None)
    if isinstance(graph, torch.fx.Graph):
        values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
        known = [value for value in values if isinstance(value, Tensor)]
        return [(value.dtype, (None, *value.shape[1:])) for value in known]
    try:
        value = example_inputs_for(model)[0][0]
        return [(value.dtype, (None, *value.shape[1:]))]
    except ValueError:
        pass
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return [(torch.int64, (None, None))]
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return [(module.weight.dtype, (None, module.in_channels, *[None] * len(module.kernel_size)))]
        if isinstance(module, nn.Linear):
            return [(module.weight.dtype, (None, module.in_features))]
    return []


def _remedy(x: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> str | None:
    if x.dtype != dtype:
        if dtype.is_floating_point and not x.is_floating_point():
            return "pass x.float() / 255" if x.dtype == torch.uint8 else "pass x.float()"
        return f"pass x.to({dtype})"
    if _fits(x.shape, shape):
        return None
    size = [number for number in shape[2:] if number is not None]
    if x.dim() == len(shape) - 1 and _fits((1, *x.shape), shape):
        return "pass x.unsqueeze(0), a batch of one"
    if x.dim() == len(shape) - 1 and shape[1] == 1:
        return "pass x.unsqueeze(1), with a channel"
    if x.dim() != len(shape):
        return f"pass a tensor of {len(shape)} axes"
    if x.dim() > 2 and x.shape[-1] == shape[1] != x.shape[1]:
        axes = ", ".join(map(str, (0, x.dim() - 1, *range(1, x.dim() - 1))))
        return f"pass x.permute({axes})"
    if x.dim() > 2 and x.shape[1] == 1 and shape[1] is not None:
        return f"pass x.expand(-1, {shape[1]}, {', '.join(['-1'] * (x.dim() - 2))})"
    if x.shape[1] == shape[1] and len(size) == x.dim() - 2:
        return f"pass torch.nn.functional.interpolate(x, {_tuple(size)}), or build the model for that size"
    return "pass a tensor of that shape"


def _fits(given: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(given) == len(wanted) and all(b in (None, a) for a, b in zip(given, wanted, strict=True))


def _letters(sizes: tuple[int | None, ...]) -> list[str]:
    free = iter({2: "L", 3: "HW", 4: "DHW"}.get(len(sizes), "*" * len(sizes)))
    return [next(free) if size is None else str(size) for size in sizes]


def _tuple(sizes: Any) -> str:
    return f"({', '.join(map(str, sizes))})"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
