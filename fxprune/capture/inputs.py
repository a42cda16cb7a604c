"""Example inputs: those the caller gave, or what a known model says about itself.

In: a model and whatever was passed as ``example_inputs``. Out: positional and keyword arguments for its
``forward``. Only shapes and types of tensors count later on, so those made here hold no data.
"""

from __future__ import annotations

import inspect
import sys
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.capture.module import CapturedModule

__all__ = ["example_inputs_for"]

BATCH = 2


def example_inputs_for(
    model: nn.Module, example_inputs: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to capture a model with.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; or None for timm
            models (their ``pretrained_cfg`` is read), torchvision models (the transforms of their published
            weights), and captured models.

    Returns:
        Positional and keyword arguments of ``model.forward``. Tensors made here stand on the meta device.

    Raises:
        TypeError: ``example_inputs`` is something else.
        ValueError: there are none, and the model is not known.

    Example:
        >>> example_inputs_for(nn.Linear(4, 2), torch.ones(2, 4))[0][0].shape
        torch.Size([2, 4])
    """
    if isinstance(example_inputs, Tensor):
        if not example_inputs.numel():
            raise ValueError(
                f"example_inputs: a tensor of shape {tuple(example_inputs.shape)} is empty, and no layer has"
                " anything to do; pass at least one sample"
            )
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        if len(example_inputs) > 1 and all(type(size) is int for size in example_inputs):
            raise TypeError(
                f"example_inputs={tuple(example_inputs)}: a shape is no input; pass a tensor, as in"
                f" torch.ones({', '.join(map(str, example_inputs))})"
            )
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if example_inputs is not None:
        hint = "; pass torch.from_numpy(x)" if isinstance(example_inputs, np.ndarray) else ""
        hint = "; pass tuple(...) of it" if isinstance(example_inputs, list) else hint
        raise TypeError(
            f"example_inputs: expected a tensor, a tuple or a dict, got {type(example_inputs).__name__}{hint}"
        )
    if isinstance(model, CapturedModule):
        return (), _recorded(model)
    shape = _timm_shape(model) or _torchvision_shape(model)
    if shape is None:
        raise ValueError(
            f"example_inputs: the input size of {type(model).__name__} is not known; "
            "pass a tensor, a tuple or a dict"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return (torch.empty(BATCH, *shape, dtype=dtype, device="meta"),), {}


def _recorded(model: CapturedModule) -> dict[str, Any]:
    """The inputs that a captured model was captured with."""
    names = inspect.signature(model.forward).parameters
    return {
        str(node.target): node.meta["val"]
        for node in model.graph.nodes
        if node.op == "placeholder" and node.target in names
    }


def _timm_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Channels, height and width as the model was built; the published ones where it does not say."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("input_size"):
        return None
    channels, height, width = config["input_size"]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple | list) and len(size) == 2:
        height, width = size
    first = config.get("first_conv")
    stem = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    if isinstance(stem, nn.Conv2d):
        # Stems that fold pixels into channels first have another number of them than the image.
        known = {1, 3, 4}
        channels = stem.in_channels if stem.in_channels in known and channels in known else channels
    return channels, height, width


def _torchvision_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Three channels of the size to which the transforms of the published weights crop.

    One class serves many sizes (EfficientNet: eight): the number of parameters tells which one it is. If that
    does not tell, nothing is said.
    """
    home = type(model).__module__
    if home.split(".")[0] != "torchvision":
        return None
    tables = [value for value in vars(sys.modules[home]).values() if _is_weights(value)]
    weights = [weight for table in tables for weight in table]
    counts = {sum(p.numel() for p in model.parameters())}
    counts |= {count + _usual_head(model) for count in counts}
    matching = [weight for weight in weights if weight.meta.get("num_params") in counts]
    sizes = {_crop(weight) for weight in matching or weights}
    if None in sizes or not sizes or (len(sizes) > 1 and not matching):
        return None
    size = min(size for size in sizes if size is not None)
    return 3, size, size


def _is_weights(value: Any) -> bool:
    """An enum of published weights, known by its name: torchvision is slow to import."""
    return isinstance(value, type) and issubclass(value, Enum) and value.__name__.endswith("_Weights")


def _usual_head(model: nn.Module) -> int:
    """By how many parameters the usual classifier of 1000 classes exceeds the model's own."""
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return (1000 - heads[-1].out_features) * (heads[-1].in_features + 1) if heads else 0


def _crop(weight: Any) -> int | None:
    options = getattr(weight.transforms, "keywords", {})
    size = options.get("crop_size", options.get("resize_size"))
    return size if isinstance(size, int) else None
