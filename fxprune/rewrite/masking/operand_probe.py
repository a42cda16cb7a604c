"""Record the weights that a layer really multiplies its input with.

Used before a mask is set (does the layer compute something from its weight that is not zero where the weight
is?), when zeros are baked in, and as the proof that :func:`fxprune.rewrite.masking.verify` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.rewrite.masking.copying import cast_numbers, duplicate
from fxprune.rewrite.masking.sharded import is_sharded, plain_twin
from fxprune.rewrite.masking.weight_functions import KERNELS, PRODUCTS, weight_operand
from fxprune.torch_private import ConvNd

FAILURES = (
    RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError,
)  # fmt: skip
"""What running somebody's forward on made-up data may raise."""


class UnfollowableError(ValueError):
    """A layer whose kernel is computed from its weight in a way that no mask can follow."""


class OperandRecorder(TorchFunctionMode):
    """Keep the weights that convolutions and linear calls are given, and all factors of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.factors: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KERNELS and isinstance(weight_operand(args, kwargs), torch.Tensor):
            self.seen.append(weight_operand(args, kwargs))
        if func in PRODUCTS:
            self.factors += [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if func is nn.functional.multi_head_attention_forward:
            self.seen += [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return func(*args, **kwargs)


def example_input(module: nn.Module, weight: torch.Tensor, margin: int = 2) -> tuple[torch.Tensor, ...]:
    """A small random input for a layer that multiplies it with ``weight``, in the weight's dtype and device.

    ``margin``: how many positions a convolution's input is longer than its kernel.
    """
    like: Any = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, nn.MultiheadAttention):
        sizes = (module.embed_dim, module.kdim, module.vdim)
        return tuple(torch.randn(3, 2, size, **like) for size in sizes)
    if isinstance(module, ConvNd):
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (torch.randn(2, module.in_channels, *(size + margin for size in reach), **like),)
    if isinstance(module, nn.Bilinear):
        return tuple(torch.randn(2, size, **like) for size in (module.in1_features, module.in2_features))
    groups = getattr(module, "groups", 1)
    channels = weight.shape[1] * (groups if isinstance(groups, int) else 1)
    return (torch.randn(2, channels, *(size + margin for size in weight.shape[2:]), **like),)


def recorded(forward: Callable[..., Any], inputs: tuple[Any, ...], shape: torch.Size) -> list[torch.Tensor]:
    """The weight operands of that shape in one run of ``forward``."""
    with OperandRecorder() as recorder:
        forward(*inputs)
    return [operand for operand in recorder.seen if operand.shape == shape]


SAMPLE = 16
"""Entries of a weight that are looked at, about."""


def moves_zeros(operand: Callable[[torch.Tensor], torch.Tensor | None], shape: torch.Size) -> bool:
    """Whether a layer's computation from weight to kernel operand turns pruned (zero) entries into others.

    ``operand`` maps a weight (float64, CPU) to the operand of the same shape, or None when there is none.
    Weight standardisation: True. A scale, a cast, a transposition: False. Raises UnfollowableError when zeros
    move so that there is no place for the mask: entry i of the operand is not about entry i of the weight.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) > 0.5
    weight = (torch.randn(shape, generator=generator, dtype=torch.float64) * mask).requires_grad_()
    found = operand(weight)
    if found is None or int((found == 0).sum()) >= int((~mask).sum()):
        return False
    sample = mask.flatten().nonzero().flatten()
    sample = sample[:: max(1, len(sample) // SAMPLE)]
    own = others = 0.0
    for index in sample.tolist():
        (slope,) = torch.autograd.grad(found.flatten()[index], weight, retain_graph=True)
        squares = slope.flatten().square()
        own += float(squares[index])
        squares[index] = 0
        others += float(squares.sum() / (squares > 0).sum().clamp(min=1))
    # On average: in a small filter an entry far from the mean moves other values more than its own.
    if own * (1 + 1e-9) < others:
        raise UnfollowableError("the kernel is computed from the weight in a way that no mask can follow")
    return True


def needs_operand_mask(module: nn.Module, attribute: str) -> bool:
    """:func:`moves_zeros` for a layer that nobody has masked yet, by running its forward on a small input.

    False for a module whose input cannot be guessed: the masked read is then all there is.
    """
    weight = module._parameters[attribute]
    assert weight is not None
    twin = private_twin(module, torch.float64)

    def operand(value: torch.Tensor) -> torch.Tensor | None:
        del twin._parameters[attribute]
        setattr(twin, attribute, value)
        try:
            found = recorded(twin.forward, example_input(module, value), weight.shape)
        finally:
            delattr(twin, attribute)
            twin._parameters[attribute] = nn.Parameter(value.detach())
        return found[0] if found else None

    try:
        return moves_zeros(operand, weight.shape)
    except UnfollowableError:
        raise
    except FAILURES:
        return False


def private_twin(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy on the CPU in eval mode, to be run at will; its values are made up where the module has none."""
    twin = plain_twin(module) if is_sharded(module) else duplicate(module)
    if any(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers()]):
        twin = twin.to_empty(device="cpu")
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.data.fill_(1)
    twin = twin.to(device="cpu")
    return (twin if dtype is None else cast_numbers(twin, dtype)).eval()
