"""The oracle: which weights lie on an input-output path, found without fxprune.

The *original eager model* runs once; nothing is traced and nothing of `fxprune` is imported. Each float
tensor of that run is a `Dual` (oracle_rules): a 0/1 pattern of what is not zero, and the paths that have
arrived there from the network's float inputs. A weight is effective where the sum of the outputs has a
non-zero derivative with respect to it *along the paths*. All numbers are small non-negative integers (they
are made 0/1 again after each operation, forward and backward), so nothing cancels, underflows or overflows.

Counting (`log_paths`, `count_paths`, `path_gradients`) is the same run without the rounding to 0/1.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from oracle_rules import Dual, Setting, UnknownOpError, perform
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "UnknownOpError",
    "count_paths",
    "effective_parameters",
    "log_paths",
    "path_gradients",
    "prunable",
    "random_masks",
]

Masks = Mapping[str, Tensor]
Known = dict[int, tuple[Tensor, Dual]]  # by id; the tensor is kept, so that no other one can take its id
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable(model: nn.Module, named: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Weights of every linear, convolution and `nn.MultiheadAttention`, and the parameters that are `named`.

    A shared one goes under its first name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]) for name in named if name in parameters}
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd):
            wanted.add(id(module.weight))
        if isinstance(module, nn.MultiheadAttention):
            wanted |= {id(getattr(module, name)) for name in _PROJECTIONS}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def random_masks(model: nn.Module, density: float, seed: int, named: Iterable[str] = ()) -> dict[str, Tensor]:
    """Independent coin flips: every prunable (or `named`) weight is kept with probability `density`."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in prunable(model, named).items():
        masks[name] = torch.rand(weight.shape, generator=generator, device="cpu") < density
    return masks


def effective_parameters(
    model: nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    padding: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The kept weights on at least one live path, for every prunable parameter (a missing mask keeps all).

    `padding="circular"` runs zero-padded convolutions, pools and spatial pads as if images were periodic.
    `dtype=torch.float32` halves time and memory; the answer is the same. The model may be on the meta device.
    Raises `UnknownOpError`, naming the operation, where the model uses one that has no rule.
    """
    if padding not in (None, "circular"):
        raise ValueError(f"padding is None or 'circular', not {padding!r}")
    setting = Setting(counting=False, circular=padding == "circular", dtype=dtype)
    total, leaves = _run(model, example_inputs, masks, setting)
    gradients = _gradients(total, leaves)
    return {name: (gradients[name] > 0) & (leaf > 0) for name, leaf in leaves.items()}


def log_paths(model: nn.Module, example_inputs: Any, masks: Masks) -> float:
    """Natural log of the number of paths, R_P (average pools sum, max-pools take the maximum), or -inf."""
    for exponent in (0, 1000):
        setting = Setting(counting=True, circular=False, start=2.0**-exponent)
        total = float(_run(model, example_inputs, masks, setting)[0].detach())
        if math.isfinite(total):
            return math.log(total) + exponent * math.log(2) if total > 0 else -math.inf
    raise OverflowError("more than 2**2024 paths: count a smaller network")


def count_paths(model: nn.Module, example_inputs: Any, masks: Masks) -> int:
    """The exact number of paths; raises `OverflowError` from 2**53 on, where float64 is no longer exact."""
    total = float(_run(model, example_inputs, masks, Setting(counting=True, circular=False))[0].detach())
    if not total < 2**53:
        raise OverflowError(f"{total:.3g} paths are beyond the exact range of float64")
    return round(total)


def path_gradients(model: nn.Module, example_inputs: Any, masks: Masks) -> dict[str, Tensor]:
    """d ln R_P / d mask, also at pruned entries. Where there is no path, d R_P / d mask."""
    total, leaves = _run(model, example_inputs, masks, Setting(counting=True, circular=False))
    if not math.isfinite(float(total.detach())):
        raise OverflowError("more than 2**1024 paths: differentiate a smaller network")
    scale = total.detach().clamp(min=1)
    return {name: gradient / scale for name, gradient in _gradients(total, leaves).items()}


def _gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _run(
    model: nn.Module, example_inputs: Any, masks: Masks, setting: Setting
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all paths at the outputs, and the 0/1 weights it depends on."""
    model = copy.deepcopy(model).eval()
    known, leaves = _parameters(model, masks, setting)
    inputs = tree_map(lambda leaf: _source(leaf, setting), example_inputs)
    setting.integers = {id(leaf) for leaf in tree_leaves(inputs) if type(leaf) is Tensor}
    args: Any = inputs if isinstance(inputs, tuple | list) else (inputs,)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with Interpreter(known, setting):
            outputs = model(**inputs) if isinstance(inputs, dict) else model(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    paths = [dual.check().paths for dual in _duals(outputs)]
    zero = torch.zeros((), dtype=setting.dtype)
    return sum((path.sum() for path in paths if path is not None), zero), leaves


def _parameters(model: nn.Module, masks: Masks, setting: Setting) -> tuple[Known, dict[str, Tensor]]:
    """Every parameter and float buffer by identity: its mask if it is prunable, else positive throughout."""
    weights = prunable(model, masks)
    for name in set(masks) - set(weights):
        raise ValueError(f"no parameter is named {name!r}")
    leaves: dict[str, Tensor] = {}
    known: Known = {}
    for name, parameter in model.named_parameters():
        pattern = torch.ones(parameter.shape, dtype=setting.dtype)
        if name in weights:
            if name in masks:
                pattern = (masks[name] != 0).to("cpu", setting.dtype)
            leaves[name] = pattern.requires_grad_()
        known[id(parameter)] = parameter, Dual.make(pattern)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            known[id(buffer)] = buffer, Dual.make(torch.ones(buffer.shape, dtype=setting.dtype))
    return known, leaves


def _source(leaf: Any, setting: Setting) -> Any:
    """One path starts in each entry of a float input; integers start them where they are looked up."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    ones = torch.ones(leaf.shape, dtype=setting.dtype)
    return Dual.make(ones, ones * setting.start)


def _duals(value: Any) -> Iterator[Dual]:
    """Every `Dual` in a nest of containers, also of dataclasses and of mappings torch has not heard of."""
    if isinstance(value, Dual):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _duals(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _duals(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _duals(getattr(value, field.name))


class Interpreter(TorchFunctionMode):
    """Carries out every torch function that touches a dual, a parameter or a float buffer on duals."""

    def __init__(self, known: Known, setting: Setting) -> None:
        super().__init__()
        self.known, self.setting = known, setting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._lift, (args, kwargs or {}))
        touched = any(type(leaf) is Dual for leaf in tree_leaves((args, kwargs)))
        if not touched and not self.setting.is_lookup(func, args):
            return func(*args, **kwargs)
        with torch.enable_grad():
            return perform(self.setting, func, args, kwargs)

    def _lift(self, leaf: Any) -> Any:
        if type(leaf) is Dual or not isinstance(leaf, Tensor):
            return leaf
        return self.known.get(id(leaf), (leaf, leaf))[1]
