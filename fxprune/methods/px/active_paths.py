"""How much of a network's paths is active on given data: a forward pass that carries a second number.

A model and a batch come in; for every output, the sum over all paths that end there of the squared gains
along them goes out: squared inputs, masks for weights, and at every activation the squared gain that it has
in the real pass. Biases add nothing and norms pass everything.

The gain of an activation s at z is s(z) / z, so that values times gains, summed over paths, are the network
itself: 0 or 1 for ReLU, 1 or the slope for leaky ReLU, Phi(z) for GELU, sigmoid(z) for SiLU. Where s(0) is
not 0 (sigmoid, softplus) it is the derivative. In a product each factor is the gain of the other; attention
weights are gains of the values, and no path goes through them. Max-pooling passes what wins in the real pass.

Sums over paths leave every floating-point range in a deep network. They are float32 and a power of two, which
costs what the real pass costs; sums of non-negative terms lose no precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

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


EMPTY = -(10**9)
"""The power of two of a tensor without any path: below every other."""
AIM, SLACK = 32, 16
"""Largest entries are 2^16 to 2^48: sums of products of two of them have room above, small ones below."""


class Number(NamedTuple):
    """``values * 2 ** power``, not negative: a sum over paths for each entry of some tensor."""

    values: Any
    power: int


class Activity(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, operations on tensors that it follows carry their second number along.

    ``paths``: tensors that depend on the data -> squared gains of the paths that arrive. ``weights``: tensors
    made of parameters alone -> the masks in their place. Both hold a :class:`Number`.
    """

    def __init__(self, masks: Mapping[Tensor, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths: Any = WeakTensorKeyDictionary()
        self.weights: Any = WeakTensorKeyDictionary()
        for weight, mask in masks.items():
            self.weights[weight] = Number(mask.float(), 0)

    def start(self, inputs: Any) -> None:
        """Every real number of the inputs is where paths begin."""
        for part in tree_leaves(inputs):
            if isinstance(part, Tensor) and part.is_floating_point():
                self.paths[part] = _squared(part)

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
            self.paths[output] = _squared(output)
            return output
        for table in (self.paths, self.weights):
            if any(isinstance(x, Tensor) and x in table for x in tree_leaves((before, kwargs))):
                found = rule(func, before, kwargs, output, table)
                one = isinstance(found.values, Tensor) and not isinstance(output, Tensor)
                _record(table, output[0] if one else output, found)
                break
        return output

    def _rule(self, packet: Any) -> tuple[Callable[..., Number], bool]:
        """What makes the second number of an operation, and whether it reads the real values of inputs."""
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
    def _relu(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        values, power = table[args[0]]
        return Number(values.where(output > 0, 0.0) if table is self.paths else values, power)

    def _activation(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        z = args[0]
        if z not in self.paths:
            return self._moved(func, args, kwargs, output, table)
        gain = _gain(lambda x: _first(func(x, *args[1:], **kwargs)), z, _first(output))
        values, power = self.paths[z]
        return Number(values * gain.square(), power)

    def _same(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        shape = _first(output).shape
        values, power = next(table[x] for x in tree_leaves(args) if isinstance(x, Tensor) and x in table)
        return Number(
            values.reshape(shape) if values.numel() == shape.numel() else values.expand(shape), power
        )

    def _sum(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        return added([table[x] for x in args if isinstance(x, Tensor) and x in table], output.shape)

    def _product(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        a, b = args[:2]
        if not all(isinstance(x, Tensor) and x in self.paths for x in (a, b)):
            return self._same(func, args, kwargs, output, table)
        halves = [
            _times(torch.mul, self.paths[a], _squared(b)),
            _times(torch.mul, _squared(a), self.paths[b]),
        ]
        return added(halves, output.shape)

    def _matrix_product(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        a, b = args[:2]
        if a not in self.paths or b not in self.paths:
            return self._contraction(func, args, kwargs, output, table)
        halves = [(self.paths[a], _squared(b)), (_squared(a), self.paths[b])]
        live = [_times(func, x, y) for x, y in halves if EMPTY not in (x.power, y.power)]
        return added(live, output.shape) if live else self._nothing(func, args, kwargs, output, table)

    def _matrix_product_with_bias(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        product = aten.mm.default if func.overloadpacket is aten.addmm else aten.bmm.default
        found = self._matrix_product(product, args[1:3], {}, output, table)
        return added([found, self.paths[args[0]]], output.shape) if args[0] in self.paths else found

    def _contraction(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        """With masks for weights, and without a bias; what comes from neither data nor weights is one."""
        settings = (None, *args[3:]) if len(args) > 2 else ()
        a, b = (self._number(x) for x in args[:2])
        return _times(lambda x, y: func(x, y, *settings), a, b)

    def _number(self, x: Tensor) -> Number:
        for table in (self.paths, self.weights):
            if x in table:
                found: Number = table[x]
                return found
        return Number(torch.ones_like(x, dtype=torch.float32), 0)

    def _max_pool(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        indices = output[1]
        rank = 3 if "3d" in func.overloadpacket.__name__ else 2
        values, power = table[args[0]]
        winners = values.flatten(-rank).gather(-1, indices.flatten(-rank))
        return Number(winners.view(indices.shape), power)

    def _nothing(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        return Number(torch.zeros_like(output, dtype=torch.float32), EMPTY)

    def _moved(self, func: Any, args: Any, kwargs: Any, output: Any, table: Any) -> Number:
        """The operation itself, on the second numbers; real numbers that come from no data are zero."""
        followed = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x in table]
        power = max(table[x].power for x in followed)

        def number(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            if x not in table:
                return torch.zeros_like(x, dtype=torch.float32)
            values = at_power(table[x], power)
            return values.clone() if func._schema.is_mutable else values

        found = func(*tree_map(number, args), **tree_map(number, kwargs))
        return (
            _settled(found, power) if isinstance(found, Tensor) and not func.is_view else Number(found, power)
        )


# -- numbers ------------------------------------------------------------------------------------------------
def at_power(number: Number, power: int) -> Tensor:
    """Values at a power that is not smaller than its own; what is too small for it is zero."""
    values: Tensor = number.values
    return values if number.power == power else values * math.ldexp(1.0, number.power - power)


def _settled(values: Tensor, power: int) -> Number:
    """``values * 2 ** power`` with its largest entry near 2 ** AIM: nothing overflows in the next step."""
    top = float(values.amax()) if values.numel() else 0.0
    if top == 0:
        return Number(values, EMPTY)
    shift = max(math.frexp(top)[1] - AIM, -120)  # the factor is a float32, too
    return Number(values, power) if abs(shift) <= SLACK else Number(values * 2.0**-shift, power + shift)


def _squared(x: Tensor) -> Number:
    """Real numbers, squared: those of one are where paths begin, those of a factor its gain."""
    low, high = (float(end) for end in x.aminmax()) if x.numel() else (0.0, 0.0)
    shift = max(math.frexp(max(-low, high))[1], -120)
    return Number((x * 2.0**-shift).float().square(), 2 * shift)


def _times(product: Callable[[Tensor, Tensor], Tensor], a: Number, b: Number) -> Number:
    """A product that is linear in either factor."""
    return _settled(product(a.values, b.values), a.power + b.power)


def added(numbers: Sequence[Number], shape: torch.Size) -> Number:
    """Their sum, broadcast to ``shape``."""
    power = max(number.power for number in numbers)
    first, *others = (at_power(number, power) for number in numbers)
    if not others:
        return Number(first.expand(shape), power)
    for other in others:
        first = first + other
    return _settled(first, power)


def _record(table: Any, output: Any, found: Number) -> None:
    for tensor, values in zip(tree_leaves(output), tree_leaves(found.values), strict=True):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            table[tensor] = Number(_laid_out_like(tensor, values.float().expand(tensor.shape)), found.power)


def _laid_out_like(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` with the strides of ``tensor``, on which views depend."""
    if values.stride() == tensor.stride() or 0 in tensor.stride():
        return values
    laid_out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32, device=tensor.device)
    return laid_out.copy_(values)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _gain(activation: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    """s(z) / z; at z = 0 the smaller one-sided slope; the derivative where s(0) is not 0."""
    step = 1e-3
    if (
        float(activation(z.new_zeros(z.shape[:1] + (1,) * (z.dim() - 1) if z.dim() else ())).abs().max())
        > 1e-6
    ):
        ahead, behind = (activation((z.double() + sign * step).to(z.dtype)).double() for sign in (1, -1))
        return ((ahead - behind) / (2 * step)).float()
    tiny = torch.full_like(z[:1] if z.dim() else z, step)
    slopes = [activation(sign * tiny).float().abs() / step for sign in (1, -1)]
    return torch.where(z == 0, torch.minimum(*slopes), y.float() / z.float().where(z != 0, 1.0))
