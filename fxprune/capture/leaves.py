"""Decide which modules stay one node of the graph.

In: a module. Out: whether the tracer enters it. torch.nn's own modules stay whole; so do those whose
parameters must keep their owner (convolutions, linear layers and their subclasses), and those whose call
does more than ``forward``.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxprune.capture.modes import ModeSwitch
from fxprune.capture.narrowed_norms import NarrowedGroupNorm, NarrowedLayerNorm, NarrowedRMSNorm
from fxprune.torch_private import ConvNd, NormBase

__all__ = ["dense_class", "is_compiled", "is_leaf"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
WHOLE = (
    ModeSwitch,
    NarrowedGroupNorm,
    NarrowedLayerNorm,
    NarrowedRMSNorm,
    ConvNd,
    NormBase,
    nn.Bilinear,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Transformer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    torch.jit.ScriptModule,
)


def dense_class(module: nn.Module) -> type[nn.Module]:
    """Return the class whose computation a module has: its own, or, of a masked module, the one it masks.

    A masked class says so by the attribute ``dense_class``.
    """
    found: type[nn.Module] = getattr(type(module), "dense_class", type(module))
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether it came out of ``torch.compile``; its machinery is slow to import, so only looked for."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_leaf(module: nn.Module) -> bool:
    """Whether the module becomes one ``call_module`` node.

    Example:
        >>> is_leaf(nn.Conv2d(1, 1, 1)), is_leaf(nn.Sequential())
        (True, False)
    """
    if isinstance(module, WHOLE) or parametrize.is_parametrized(module):
        return True
    if isinstance(module, CONTAINERS):
        return False
    forward = vars(module).get("forward", type(module).forward)  # some choose theirs when they are made
    home = str(getattr(forward, "__module__", ""))
    return home.startswith(("torch.nn.", "torch.ao.nn."))
