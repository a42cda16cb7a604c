"""Small networks, one hazard of masking each, with inputs for them, and masks."""

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from torch import nn

from fxprune.sparsity.masks import Masks


class ScaledLinear(nn.Linear):
    """A linear layer with a forward of its own: the weight is scaled."""

    def forward(self, input):
        return F.linear(input, self.weight * 0.5, self.bias)


class TransposedLinear(nn.Linear):
    """A square linear layer that uses its weight transposed: no place for a mask on the operand."""

    def forward(self, input):
        return input @ self.weight + F.linear(input, self.weight.t())


class Block(nn.Module):
    """One layer between two elementwise functions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).tanh()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear3d": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7)),
    "one_channel": (lambda: nn.Conv2d(1, 1, 3, groups=1), (2, 1, 7, 7)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "same": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "std": (lambda: StdConv2d(4, 6, 3), (2, 4, 7, 7)),
    "scaled_std": (lambda: ScaledStdConv2d(4, 6, 3), (2, 4, 7, 7)),
    "scaled_std_same": (lambda: ScaledStdConv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "own_scaled": (lambda: ScaledLinear(6, 5), (3, 6)),
    "own_transposed": (lambda: TransposedLinear(5, 5), (3, 5)),
}
STANDARDISED = ("std", "scaled_std", "scaled_std_same")


def layer(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A seeded block around one of LAYERS, and an input."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return Block(make()), torch.randn(*shape)


class FunctionalConv(nn.Module):
    """Raw parameters, used by functions, on the root and below it."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.inner = nn.Module()
        self.inner.kernel = nn.Parameter(torch.randn(5, 4, 1, 1))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = F.conv2d(x, self.kernel).relu()
        return self.head(F.conv2d(x, self.inner.kernel).mean((2, 3)))


class Standardised(nn.Module):
    """A weight-standardised convolution written by hand, with a raw parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), stride=2)


class ReadsChild(nn.Module):
    """An attention-like block that reads its child's weight and does not call the child."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 12, bias=False)
        self.bias = nn.Parameter(torch.randn(12))
        self.proj = nn.Linear(12, 6)

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight, self.bias).tanh())


class Attention(nn.Module):
    """``nn.MultiheadAttention``, with one width or with three."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.key = options.get("kdim", 8)

    def forward(self, x):
        key = x[..., : self.key]
        return self.attention(x, key, key, need_weights=False)[0]


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, whose evaluation reads the weights of its children directly."""

    def __init__(self, nested=True):
        super().__init__()
        one = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=nested)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def masks_for(model: nn.Module, density: float = 0.5, seed: int = 0) -> Masks:
    """Random masks for all parameters with two dimensions or more."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in model.named_parameters()
        if weight.ndim > 1
    }


def raw_zero(model: nn.Module, masks: Masks) -> bool:
    """Whether every pruned weight is exactly zero in storage."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    return all(bool((stored[name].detach()[~mask] == 0).all()) for name, mask in masks.items())


def pruned_gradients_are_zero(model: nn.Module, masks: Masks) -> bool:
    stored = dict(model.named_parameters(remove_duplicate=False))
    return all(bool((stored[name].grad[~mask] == 0).all()) for name, mask in masks.items())
