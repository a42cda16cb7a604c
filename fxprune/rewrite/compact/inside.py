"""Find the weight that a layer with code of its own computes from its parameter: it runs, and is watched."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxprune.rewrite.compact.modules import set_sizes
from fxprune.rewrite.compact.trial import RUN_ERRORS

__all__ = ["weight_inside"]

_LAYERS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip


class _Weights(TorchFunctionMode):
    """Keeps the weights of all layers that are called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _LAYERS:
            self.found.append(given["weight"] if "weight" in given else args[1])
        return func(*args, **given)


def weight_inside(gm: fx.GraphModule, call: fx.Node, name: str, parameter: Tensor) -> Tensor | None:
    """Return the weight that a called layer reads with these numbers in its parameter ``name``.

    ``None`` where that is not the weight of a linear map or a convolution, or the layer does not run on them.
    """
    module, source = gm.get_submodule(str(call.target)), call.all_input_nodes[:1]
    if name != f"{call.target}.weight" or len(call.all_input_nodes) != 1 or parameter.dim() < 2:
        return None
    like = source[0].meta["val"]
    one: Any = copy.deepcopy(module, {id(each): each for each in module.parameters()})
    one.weight = nn.Parameter(parameter, requires_grad=False)
    if len(parameter) != len(gm.get_parameter(name)):
        one.bias = None  # it has another length, and no part in the weight
    set_sizes(one, None)
    shape = list(like.shape)
    axis = len(shape) - 1 if isinstance(module, nn.Linear) else len(shape) - parameter.dim() + 1
    shape[axis] = parameter.shape[1] * getattr(module, "groups", 1)
    watching = _Weights()
    try:
        with torch.no_grad(), watching:
            one(torch.zeros(shape, dtype=like.dtype, device=parameter.device))
    except RUN_ERRORS:
        return None
    found = watching.found
    return found[0].detach() if len(found) == 1 and isinstance(found[0], Tensor) else None
