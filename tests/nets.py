"""Tiny networks, one structural feature each: the ground on which every part of fxprune is compared.

`NETS[name]()` returns `(module, example_inputs)`, batch 2; the caller seeds torch. The batch size is free:
no network reads it from the example. At most 16 channels (24 inside a fused qkv) and 12 x 12 pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from net_blocks import (
    Across,
    CrossAttention,
    Dense,
    DictInput,
    Excite,
    Gated,
    LayerScale,
    Mixer,
    MultiHead,
    Norms,
    NormStandardConv2d,
    Residual,
    Reused,
    SelfAttention,
    Shuffle,
    Split,
    StandardConv2d,
    Tied,
    TwoInputs,
    TwoOutputs,
    Vit,
    Window,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower

Example = tuple[nn.Module, Any]


def mlp(bias: bool) -> nn.Module:
    """Three linear layers."""
    sizes = [6, 8, 8, 4]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def encoder() -> nn.Module:
    """`nn.TransformerEncoderLayer` and a head."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.1, batch_first=True)
    return nn.Sequential(layer, nn.Linear(8, 3))


def image(side: int = 8, channels: int = 3, *, dims: int = 2) -> Tensor:
    """Two random images."""
    return torch.randn(2, channels, *[side] * dims)


def net(build: Callable[[], nn.Module], inputs: Callable[[], Any]) -> Callable[[], Example]:
    """A row of the table: weights are drawn first, then the example."""
    return lambda: (build(), inputs())


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A sequence whose layers are made when called."""
    return lambda: nn.Sequential(*[layer() for layer in layers])


def conv(*args: int, dims: int = 2, **kwargs: Any) -> Callable[[], nn.Module]:
    """A convolution, made when called."""
    kind: Sequence[type[nn.Module]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return lambda: kind[dims - 1](*args, **kwargs)


def tokens() -> Tensor:
    """Two sequences of five tokens of width 8."""
    return torch.randn(2, 5, 8)


NETS: dict[str, Callable[[], Example]] = {
    "mlp": net(lambda: mlp(bias=False), lambda: torch.randn(2, 6)),
    "mlp_bias": net(lambda: mlp(bias=True), lambda: torch.randn(2, 6)),
    "conv_chain": net(chain(conv(3, 8, 3), nn.ReLU, conv(8, 8, 3), nn.ReLU, conv(8, 4, 3)), image),
    "conv_free": net(chain(conv(3, 8, 3, padding=1, bias=False), conv(8, 4, 3, bias=False)), image),
    "residual": net(chain(conv(3, 6, 1), lambda: Residual(conv(6, 6, 3, padding=1)()), conv(6, 3, 1)), image),
    "projection": net(
        lambda: Residual(
            nn.Sequential(conv(3, 6, 3, stride=2, padding=1, bias=False)(), nn.ReLU(), conv(6, 8, 1)()),
            conv(3, 8, 1, stride=2, bias=False)(),
        ),
        image,
    ),
    "dense": net(Dense, image),
    "split": net(Split, image),
    "shuffle": net(Shuffle, lambda: image(6, 4)),
    "depthwise": net(
        chain(conv(3, 6, 1), conv(6, 6, 3, padding=1, groups=6), nn.ReLU6, conv(6, 4, 1, bias=False)), image
    ),
    "multiplier": net(chain(conv(3, 9, 3, padding=1, groups=3), conv(9, 4, 1, bias=False)), image),
    "grouped": net(chain(conv(4, 8, 3, groups=2), conv(8, 6, 1, groups=2, bias=False)), lambda: image(6, 4)),
    "dilated": net(chain(conv(3, 6, 3, padding=2, dilation=2), conv(6, 3, 3, dilation=3)), image),
    "strided": net(
        chain(conv(3, 6, 3, stride=2, padding=1, bias=False), conv(6, 4, 3, stride=2, padding=1, bias=False)),
        lambda: image(7),
    ),
    "dead_taps": net(
        chain(conv(3, 6, 3, stride=2, padding=1), conv(6, 6, 3, padding=1, bias=False), conv(6, 3, 1)),
        lambda: image(2),
    ),
    "even_kernel": net(
        chain(conv(3, 6, 2, padding=1, bias=False), conv(6, 3, 4, stride=2, padding=1)), image
    ),
    "rectangular": net(
        chain(conv(3, 6, (1, 5), padding="same", bias=False), conv(6, 3, (3, 1), padding=(1, 0))), image
    ),
    "reflected": net(chain(conv(3, 6, 3, padding=1, padding_mode="reflect"), conv(6, 3, 1)), image),
    "flatten": net(
        chain(
            conv(3, 4, 3, stride=2, padding=1), nn.Flatten, lambda: nn.Linear(64, 6), lambda: nn.Linear(6, 3)
        ),
        image,
    ),
    "adaptive_pool": net(
        chain(
            conv(3, 6, 3),
            lambda: nn.AdaptiveAvgPool2d(4),
            conv(6, 6, 3),
            lambda: nn.AdaptiveAvgPool2d(1),
            nn.Flatten,
            lambda: nn.Linear(6, 3),
        ),
        image,
    ),
    "max_pool": net(
        chain(
            conv(3, 6, 3, bias=False),
            lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
            conv(6, 4, 3, padding=1, bias=False),
        ),
        image,
    ),
    "avg_pool": net(
        chain(conv(3, 6, 3, bias=False), lambda: nn.AvgPool2d(2), conv(6, 4, 3, bias=False)), image
    ),
    "tied": net(Tied, lambda: torch.randn(2, 6)),
    "reused": net(Reused, image),
    "transposed": net(
        chain(
            conv(3, 6, 3, stride=2, padding=1),
            lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, bias=False),
            lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=False),
        ),
        image,
    ),
    "excite_sigmoid": net(lambda: Excite(torch.sigmoid), image),
    "excite_hard": net(lambda: Excite(F.hardsigmoid), image),
    "glu": net(lambda: Gated(bias=True), lambda: torch.randn(2, 5)),
    "glu_free": net(lambda: Gated(bias=False), lambda: torch.randn(2, 5)),
    "layer_scale": net(LayerScale, lambda: image(6, 4)),
    "across": net(Across, tokens),
    "multihead": net(MultiHead, tokens),
    "cross_attention": net(CrossAttention, lambda: (torch.randn(2, 5, 8), torch.randn(2, 4, 6))),
    "attention": net(lambda: SelfAttention("matmul"), tokens),
    "attention_sdpa": net(lambda: SelfAttention("sdpa", bias=True), tokens),
    "attention_einsum": net(lambda: SelfAttention("einsum"), tokens),
    "functional": net(lambda: SelfAttention("sdpa", functional=True), tokens),
    "encoder": net(encoder, tokens),
    "vit": net(Vit, lambda: image(12)),
    "mixer": net(Mixer, lambda: image(12)),
    "window": net(Window, image),
    "pixel_shuffle": net(
        chain(
            conv(3, 8, 3, padding=1, bias=False),
            lambda: nn.PixelShuffle(2),
            conv(2, 4, 3, bias=False),
            lambda: nn.PixelUnshuffle(2),
            conv(16, 3, 1),
        ),
        lambda: image(5),
    ),
    "standard": net(
        chain(
            lambda: StandardConv2d(3, 6, 3, padding=1),
            nn.ReLU,
            lambda: NormStandardConv2d(6, 4, 3, bias=False),
        ),
        image,
    ),
    "two_inputs": net(TwoInputs, lambda: (image(), torch.randn(2, 5))),
    "two_outputs": net(TwoOutputs, lambda: torch.randn(2, 5)),
    "dict_input": net(DictInput, lambda: {"left": torch.randn(2, 4), "right": torch.randn(2, 3)}),
    "conv1d": net(
        chain(conv(3, 6, 3, dims=1), lambda: nn.BatchNorm1d(6), conv(6, 3, 3, dims=1, stride=2, bias=False)),
        lambda: image(12, dims=1),
    ),
    "conv3d": net(
        chain(conv(3, 6, 3, dims=3, padding=1, bias=False), lambda: nn.MaxPool3d(2), conv(6, 3, 2, dims=3)),
        lambda: image(4, dims=3),
    ),
    "norms": net(lambda: Norms(affine=True), image),
    "norms_plain": net(lambda: Norms(affine=False), image),
}

WITHOUT_CIRCUIT = {"transposed", "pixel_shuffle"}
"""Nets for which one number per kernel will not do: positions differ, or a view is no view."""


@functools.cache
def captured_net(name: str) -> fx.GraphModule:
    """Capture `NETS[name]`, once for all tests that only read its graph. Its weights are those of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(*NETS[name]())


@functools.cache
def lowered_net(name: str) -> ChannelGraph:
    """Lower `captured_net(name)`, once for all tests that only read the graph."""
    return lower(captured_net(name))
