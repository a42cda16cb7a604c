"""How much of a network's paths is active on given data: a forward pass that carries a second number.

A model and a batch come in; for every output, the sum over all paths that end there of the squared gains
along them goes out: squared inputs, masks for weights, and at every activation the squared gain that it has
in the real pass. Biases add nothing and norms pass everything.

The gain of an activation s at z is s(z) / z, so that values times gains, summed over paths, are the network
itself: 0 or 1 for ReLU, 1 or the slope for leaky ReLU, Phi(z) for GELU, sigmoid(z) for SiLU. Where s(0) is
not 0 (sigmoid, softplus) it is the derivative. In a product each factor is the gain of the other; attention
weights are gains of the values, and no path goes through them. Max-pooling passes what wins in the real pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

ACTIVATIONS = {
    aten.relu, aten.relu_, aten.gelu, aten.gelu_, aten.silu, aten.silu_, aten.mish, aten.mish_,
    aten.hardswish, aten.hardswish_, aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_,
    aten.hardtanh, aten.hardtanh_, aten.tanh, aten.tanh_, aten.sigmoid, aten.sigmoid_, aten.hardsigmoid,
    aten.hardsigmoid_, aten.softplus, aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.abs,
    aten.pow, aten.exp, aten.erf, aten.log_sigmoid_forward, aten._prelu_kernel,
}  # fmt: skip
NORMS = {
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm, aten._batch_norm_no_update, aten._batch_norm_with_update, aten.native_layer_norm,
    aten.native_group_norm, aten._log_softmax, aten._to_copy, aten.clone, aten.dropout, aten.native_dropout,
}  # fmt: skip
ADDITIONS = {aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub}
PRODUCTS = {aten.mul, aten.mul_}
QUOTIENTS = {aten.div, aten.div_}
MATRIX_PRODUCTS = {aten.mm, aten.bmm}
MATRIX_PRODUCTS_WITH_BIAS = {aten.addmm, aten.baddbmm}
MAX_POOLS = {
    aten.max_pool2d_with_indices, aten.max_pool3d_with_indices,
    aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
}  # fmt: skip


class Activity(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, operations on tensors that it follows carry their second number along (float64).

    ``paths``: tensors that depend on the data -> squared gains of the paths that arrive. ``weights``: tensors
    made of parameters alone -> the masks in their place.
    """

    def __init__(self, masks: Mapping[Tensor, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths: Any = WeakTensorKeyDictionary()
        self.weights: Any = WeakTensorKeyDictionary()
        for weight, mask in masks.items():
            self.weights[weight] = mask.double()

    def start(self, inputs: Any) -> None:
        """Every real number of the inputs is where paths begin."""
        for part in tree_leaves(inputs):
            if isinstance(part, Tensor) and part.is_floating_point():
                self.paths[part] = part.double().square()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        before = args
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and args[0] in self.paths:
            before = (args[0].clone(), *args[1:])
            self.paths[before[0]] = self.paths[args[0]]
        output = func(*args, **kwargs)
        if packet is aten.embedding:
            self.paths[output] = output.double().square()
            return output
        for table in (self.paths, self.weights):
            if any(isinstance(x, Tensor) and x in table for x in tree_leaves((before, kwargs))):
                found = self._rule(packet)(func, before, kwargs, output, table)
                one = isinstance(found, Tensor) and not isinstance(output, Tensor)
                _record(table, output[0] if one else output, found)
                break
        return output

    def _rule(self, packet: Any) -> Callable[..., Any]:
        for packets, rule in (
            (ACTIVATIONS, self._activation),
            (NORMS, self._same),
            (ADDITIONS, self._sum),
            (PRODUCTS, self._product),
            (QUOTIENTS, self._same),
            (MATRIX_PRODUCTS, self._matrix_product),
            (MATRIX_PRODUCTS_WITH_BIAS, self._matrix_product_with_bias),
            (MAX_POOLS, self._max_pool),
            ({aten.convolution, aten.linear}, self._contraction),
            ({aten._softmax, aten._safe_softmax}, self._nothing),
        ):
            if packet in packets:
                return rule
        return self._moved

    # -- rules: (func, args, kwargs, output, table) -> the second number of the output -----------------------
    def _activation(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        z, y = args[0], output[0] if isinstance(output, tuple) else output
        if z not in self.paths:
            moved: Tensor = self._moved(func, args, kwargs, output, table)
            return moved
        gain = _gain(lambda x: _first(func(x, *args[1:], **kwargs)), z, y)
        passed: Tensor = self.paths[z] * gain.square()
        return passed

    def _same(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        first = output[0] if isinstance(output, tuple) else output
        followed = next(x for x in tree_leaves(args) if isinstance(x, Tensor) and x in table)
        found = table[followed]
        same: Tensor = (
            found.reshape(first.shape) if found.numel() == first.numel() else found.expand(first.shape)
        )
        return same

    def _sum(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        parts = [table[x] for x in args if isinstance(x, Tensor) and x in table]
        total = torch.zeros(output.shape, dtype=torch.float64, device=output.device)
        for part in parts:
            total = total + part
        return total

    def _product(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        a, b = args[:2]
        both = all(isinstance(x, Tensor) and x in self.paths for x in (a, b))
        if not both:
            return self._same(func, args, kwargs, output, table)
        found: Tensor = self.paths[a] * b.double().square() + a.double().square() * self.paths[b]
        return found

    def _matrix_product(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        a, b = args[:2]
        if a in self.paths and b in self.paths:
            through_a = func(self.paths[a], b.double().square())
            found: Tensor = through_a + func(a.double().square(), self.paths[b])
        else:
            found = self._moved(func, args, kwargs, output, table, constant=1.0)
        return found

    def _matrix_product_with_bias(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        product = aten.mm.default if func.overloadpacket is aten.addmm else aten.bmm.default
        found = self._matrix_product(product, args[1:3], {}, output, table)
        return found + self.paths[args[0]] if args[0] in self.paths else found

    def _contraction(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        without_bias = (*args[:2], None, *args[3:])
        found: Tensor = self._moved(func, without_bias, {}, output, table, constant=1.0)
        return found

    def _max_pool(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        indices = output[1]
        rank = 3 if "3d" in func.overloadpacket.__name__ else 2
        found: Tensor = self.paths[args[0]].flatten(-rank).gather(-1, indices.flatten(-rank))
        return found.view(indices.shape)

    def _nothing(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Tensor:
        return torch.zeros(output.shape, dtype=torch.float64, device=output.device)

    def _moved(
        self, func: Any, args: Any, kwargs: Any, output: Any, table: Any, constant: float = 0.0
    ) -> Any:
        """The operation itself, on the second numbers; real numbers that come from no data are constants."""

        def number(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            for known in (self.paths, self.weights):
                if x in known and (known is table or constant):
                    return known[x].clone() if func._schema.is_mutable else known[x]
            return torch.full_like(x, constant, dtype=torch.float64)

        return func(*tree_map(number, args), **tree_map(number, kwargs))


def _record(table: Any, output: Any, found: Any) -> None:
    for tensor, number in zip(tree_leaves(output), tree_leaves(found), strict=True):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            table[tensor] = _laid_out_like(tensor, number.double().expand(tensor.shape))


def _laid_out_like(tensor: Tensor, number: Tensor) -> Tensor:
    """``number`` with the strides of ``tensor``, on which views depend."""
    if number.stride() == tensor.stride() or 0 in tensor.stride():
        return number
    laid_out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float64, device=tensor.device)
    return laid_out.copy_(number)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _gain(activation: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    """s(z) / z; at z = 0 the smaller one-sided slope; the derivative where s(0) is not 0."""
    step = 1e-3
    real = z.double()
    if (
        float(activation(z.new_zeros(z.shape[:1] + (1,) * (z.dim() - 1) if z.dim() else ())).abs().max())
        > 1e-6
    ):
        ahead, behind = (activation((real + sign * step).to(z.dtype)).double() for sign in (1, -1))
        return (ahead - behind) / (2 * step)
    tiny = torch.full_like(z[:1] if z.dim() else z, step).double()
    slopes = [activation((sign * tiny).to(z.dtype)).double().abs() / step for sign in (1, -1)]
    at_zero = torch.minimum(*slopes)
    return torch.where(real == 0, at_zero, y.double() / torch.where(real == 0, 1.0, real))
