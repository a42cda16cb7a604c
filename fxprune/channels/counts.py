"""Count kernels, nodes and multiply-adds of one layer.

The definitions are those of the DPaI paper: a *kernel* is the slice of weights between one input and one
output channel; a *node* is an output channel of a layer, and it counts if any of its incoming kernels does.
Nodes are counted in every layer by itself, shortcuts and logits included, the network's inputs not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxprune.graph import KernelSet, ir

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def count_kernels(weights: torch.Tensor) -> int:
    """Number of kernels with any weight marked in ``weights`` (bool, of the parameter's shape).

    >>> count_kernels(torch.tensor([[[True, False]], [[False, False]]]))  # 2 kernels of 2 taps
    1
    """
    return int(weights.flatten(2).any(-1).sum() if weights.dim() > 2 else weights.sum())


def count_nodes(kernels: KernelSet, weights: torch.Tensor) -> int:
    """Number of output channels with any incoming weight marked in ``weights`` (bool, of the shape)."""
    return int(has_incoming(kernels, weights.flatten(2).any(-1) if weights.dim() > 2 else weights).sum())


def has_incoming(kernels: KernelSet, marked: torch.Tensor) -> torch.Tensor:
    """Whether each output channel has an incoming kernel that is marked.

    ``marked``: bool, of the parameter's first two dimensions. The result is of shape (out,), or (groups, out
    / groups) for a transposed convolution.
    """
    if not kernels.transposed:
        return marked.any(1)
    # (in, out / groups): the rows of one group lead to the channels of that group alone.
    return marked.reshape(kernels.groups, -1, marked.shape[1]).any(1)


def masked_macs(kernels: KernelSet, kept: int) -> int:
    """Multiply-adds per sample that ``kept`` weights of a layer take: positions x kept weights.

    An upper bound of what sparse arithmetic would spend, not of what dense hardware does.
    """
    return round(kernels.macs * kept / kernels.shape.numel())


def dense_macs(op: ir.AnyOp, samples: int) -> int:
    """Return the multiply-adds of a contraction for one sample; 0 for other ops."""
    if isinstance(op, ir.Kernel):
        return op.macs
    if not isinstance(op, ir.Mix):
        return 0
    if op.equation:
        sizes: dict[str, int] = {}
        for letters, value in zip(op.equation.partition("->")[0].split(","), op.inputs, strict=True):
            for letter, size in zip(letters, value.shape, strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
        return math.prod(sizes.values()) // samples
    a, b = (value.shape for value in op.inputs)
    calls = op.product.calls if op.product is not None else ()
    if any(call.target in CONVOLUTIONS for call in calls):
        return math.prod(op.output.shape) * math.prod(b[1:]) // samples
    # Any other bilinear function: at most every entry with every entry.
    return math.prod(a) * math.prod(b) // samples
