"""Measure the active paths of a network: a forward pass that carries a second number beside each value.

The second number of a value is a sum over all paths that end there. A path contributes the product of its
squared input, the masks of its weights, and the squared gain of every activation in the real pass. Biases add
nothing, and norms pass everything.

The gain of an activation s at z is s(z) / z, so that values times gains, summed over paths, are the network
itself: 0 or 1 for ReLU, 1 or the slope for leaky ReLU, Phi(z) for GELU, sigmoid(z) for SiLU. Where s(0) is
not 0 (sigmoid, softplus) it is the derivative. In a product each factor is the gain of the other; attention
weights are gains of the values, and no path goes through them. Max-pooling passes what wins in the real pass.

Sums over paths leave every floating-point range in a deep network; they are float32 tensors and a power of
two (:class:`fxprune.paths.scaled.Scaled`). Sums of non-negative terms lose no precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.paths.scaled import EMPTY, Scaled, add, at_power, multiply, normalise, square, zeros_like
from fxprune.torch_private import TorchDispatchMode, pytree

__all__ = ["Activity"]

aten = torch.ops.aten

ACTIVATIONS = {
    aten.gelu, aten.gelu_, aten.silu, aten.silu_, aten.mish, aten.mish_,
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
RELUS = {aten.relu, aten.relu_}
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
    """While it is on, every operation on a tensor that it follows computes the second number, too.

    ``paths``: the second numbers of tensors that depend on the data. ``weights``: masks in the place of
    tensors that are made of parameters alone.
    """

    def __init__(self, masks: Mapping[Tensor, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths: Any = WeakTensorKeyDictionary()
        self.weights: Any = WeakTensorKeyDictionary()
        for weight, mask in masks.items():
            self.weights[weight] = Scaled(mask.float(), 0, 0)

    def start(self, inputs: Any) -> None:
        """Let paths begin at every floating-point tensor of the inputs."""
        for part in pytree.tree_leaves(inputs):
            if isinstance(part, Tensor) and part.is_floating_point():
                self.paths[part] = square(part)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        rule, reads_values = self._rule(packet)
        before = args
        changes = func._schema.is_mutable and args and isinstance(args[0], Tensor)
        if changes and reads_values and args[0] in self.paths:
            before = (args[0].clone(), *args[1:])
            self.paths[before[0]] = self.paths[args[0]]
        output = func(*args, **kwargs)
        if packet is aten.embedding:
            self.paths[output] = square(output)
            return output
        for table in (self.paths, self.weights):
            if any(isinstance(x, Tensor) and x in table for x in pytree.tree_leaves((before, kwargs))):
                found = rule(func, before, kwargs, output, table)
                is_first = isinstance(found.values, Tensor) and not isinstance(output, Tensor)
                _record(table, output[0] if is_first else output, found)
                break
        return output

    def _rule(self, packet: Any) -> tuple[Callable[..., Scaled[int]], bool]:
        """The rule for the second number of an operation, and whether it reads the real values of inputs."""
        for packets, rule, reads_values in (
            (RELUS, self._relu, False),
            (ACTIVATIONS, self._activation, True),
            (NORMS, self._same, False),
            (ADDITIONS, self._sum, False),
            (PRODUCTS, self._product, True),
            (QUOTIENTS, self._same, False),
            (MATRIX_PRODUCTS, self._matrix_product, True),
            (MATRIX_PRODUCTS_WITH_BIAS, self._matrix_product_with_bias, True),
            (MAX_POOLS, self._max_pool, False),
            ({aten.convolution, aten.linear}, self._contraction, False),
            ({aten._softmax, aten._safe_softmax}, self._nothing, False),
        ):
            if packet in packets:
                return rule, reads_values
        return self._moved, False

    # -- rules: (func, args, kwargs, output, table) -> the second number of the output -----------------------
    def _relu(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        number: Scaled[int] = table[args[0]]
        if table is not self.paths:
            return number
        return number.with_values(number.values.where(output > 0, 0.0))

    def _activation(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        z = args[0]
        if z not in self.paths:
            return self._moved(func, args, kwargs, output, table)
        gain = _gain(lambda x: _first(func(x, *args[1:], **kwargs)), z, _first(output))
        number: Scaled[int] = self.paths[z]
        return number.with_values(number.values * gain.square())

    def _same(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        shape = _first(output).shape
        number: Scaled[int] = next(
            table[x] for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x in table
        )
        values = number.values
        return number.with_values(
            values.reshape(shape) if values.numel() == shape.numel() else values.expand(shape)
        )

    def _sum(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        return add([table[x] for x in args if isinstance(x, Tensor) and x in table], output.shape)

    def _product(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        a, b = args[:2]
        if not all(isinstance(x, Tensor) and x in self.paths for x in (a, b)):
            return self._same(func, args, kwargs, output, table)
        halves = [
            multiply(torch.mul, self.paths[a], square(b)),
            multiply(torch.mul, square(a), self.paths[b]),
        ]
        return add(halves, output.shape)

    def _matrix_product(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        a, b = args[:2]
        if a not in self.paths or b not in self.paths:
            return self._contraction(func, args, kwargs, output, table)
        halves = [(self.paths[a], square(b)), (square(a), self.paths[b])]
        live = [multiply(func, x, y) for x, y in halves if EMPTY not in (x.level, y.level)]
        return add(live, output.shape) if live else self._nothing(func, args, kwargs, output, table)

    def _matrix_product_with_bias(
        self, func: Any, args: Any, kwargs: Any, output: Any, table: Any
    ) -> Scaled[int]:
        product = aten.mm.default if func.overloadpacket is aten.addmm else aten.bmm.default
        found = self._matrix_product(product, args[1:3], {}, output, table)
        return add([found, self.paths[args[0]]], output.shape) if args[0] in self.paths else found

    def _contraction(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        """The operation on second numbers, without a bias; tensors from neither data nor weights are ones."""
        options = (None, *args[3:]) if len(args) > 2 else ()
        a, b = (self._number(x) for x in args[:2])
        return multiply(lambda x, y: func(x, y, *options), a, b)

    def _number(self, x: Tensor) -> Scaled[int]:
        for table in (self.paths, self.weights):
            if x in table:
                found: Scaled[int] = table[x]
                return found
        return Scaled(torch.ones_like(x, dtype=torch.float32), 0, 0)

    def _max_pool(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        indices = output[1]
        rank = 3 if "3d" in func.overloadpacket.__name__ else 2
        number: Scaled[int] = table[args[0]]
        winners = number.values.flatten(-rank).gather(-1, indices.flatten(-rank))
        return number.with_values(winners.view(indices.shape))

    def _nothing(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        return zeros_like(output)

    def _moved(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Scaled[int]:
        """The operation itself, on second numbers; tensors that are not followed are zeros."""
        followed = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x in table]
        power = max(table[x].level for x in followed)

        def number(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            if x not in table:
                return torch.zeros_like(x, dtype=torch.float32)
            values = at_power(table[x], power)
            return values.clone() if func._schema.is_mutable else values

        found = func(*pytree.tree_map(number, args), **pytree.tree_map(number, kwargs))
        if isinstance(found, Tensor) and not func.is_view:
            return normalise(found, power)
        return Scaled(found, power, power)


# -- tensors ----------------------------------------------------------------------------------------------
def _record(table: Any, output: Any, found: Scaled[int]) -> None:
    """Remember ``found`` for all floating-point tensors of ``output``; its values are nested alike."""
    for tensor, values in zip(pytree.tree_leaves(output), pytree.tree_leaves(found.values), strict=True):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            values = _laid_out_like(tensor, values.float().expand(tensor.shape))
            table[tensor] = found.with_values(values)


def _laid_out_like(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` with the strides of ``tensor``, on which views depend."""
    if values.stride() == tensor.stride() or 0 in tensor.stride():
        return values
    laid_out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32, device=tensor.device)
    return laid_out.copy_(values)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


STEP = 1e-3
"""Of finite differences."""


def _gain(activation: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    """s(z) / z; at z = 0 the smaller one-sided slope; the derivative where s(0) is not 0.

    ``y`` is s(z).
    """
    zero = z.new_zeros(z.shape[:1] + (1,) * (z.dim() - 1) if z.dim() else ())
    if float(activation(zero).abs().max()) > 1e-6:
        ahead, behind = (activation((z.double() + sign * STEP).to(z.dtype)).double() for sign in (1, -1))
        return ((ahead - behind) / (2 * STEP)).float()
    tiny = torch.full_like(z[:1] if z.dim() else z, STEP)
    right, left = (activation(sign * tiny).float().abs() / STEP for sign in (1, -1))
    return torch.where(z == 0, torch.minimum(right, left), y.float() / z.float().where(z != 0, 1.0))
