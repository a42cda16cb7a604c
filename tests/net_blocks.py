"""The modules of `nets.py` that need a forward of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """`project(x) + body(x)`."""

    def __init__(self, body: nn.Module, project: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.project = project if project is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.body(x)


class Dense(nn.Module):
    """Two DenseNet layers: each one is concatenated to all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(7, 4, 3, padding=1)
        self.last = nn.Conv2d(11, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.one(x).relu()], dim=1)
        x = torch.cat([x, self.two(x).relu()], dim=1)
        return self.last(x)


class Split(nn.Module):
    """Chunk in two, treat the halves unequally, join; then an uneven split."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, dim=1)
        x = torch.cat((right, self.left(left)), dim=1)
        kept, _ = x.split([6, 2], dim=1)
        return self.last(kept)


class Shuffle(nn.Module):
    """ShuffleNet: grouped 1x1, channel shuffle, depthwise 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1, groups=2, bias=False)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.last = nn.Conv2d(8, 4, 1, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.last(self.depth(x.view(batch, -1, height, width)))


class Tied(nn.Module):
    """One `weight` Parameter in two Linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)
        self.two = nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).relu()))


class Reused(nn.Module):
    """One module called twice, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.block = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x)).relu()
        return self.last(self.block(F.max_pool2d(x, 2)))


class Excite(nn.Module):
    """Squeeze-and-excite between two convolutions, with the given gate."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 4, 1, bias=False)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        squeezed = x.mean((2, 3), keepdim=True)
        return self.last(x * self.gate(self.expand(F.relu(self.reduce(squeezed)))))


class Gated(nn.Module):
    """A GLU, and a product of two live values with no sigmoid."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 12, bias=bias)
        self.left = nn.Linear(6, 4, bias=bias)
        self.right = nn.Linear(6, 4, bias=bias)
        self.last = nn.Linear(4, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.wide(x), dim=-1)
        return self.last(self.left(x) * F.silu(self.right(x)))


class LayerScale(nn.Module):
    """`x + gamma * branch(x)`, with a raw scale parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.gamma = nn.Parameter(1e-6 * torch.ones(4, 1, 1))
        self.last = nn.Conv2d(4, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.gamma * self.branch(x))


class Across(nn.Module):
    """Convolutions of one tap over tokens: tokens are channels there, and features positions told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6, bias=False)
        self.mix, self.gate = (nn.Conv1d(5, 4, 1, bias=False) for _ in range(2))
        self.grouped = nn.Conv1d(4, 6, 1, groups=2, bias=False)
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.grouped(self.mix(x) * self.gate(x)))


class MultiHead(nn.Module):
    """A pre-norm block around `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(x + self.attention(y, y, y, need_weights=False)[0])


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` with separate projections (`kdim`, `vdim`) and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, bias=False)
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        y, _ = self.attention(query.transpose(0, 1), context.transpose(0, 1), context.transpose(0, 1))
        return self.last(y).transpose(0, 1)


class SelfAttention(nn.Module):
    """Attention by hand, in three spellings of softmax(QK^T)V; `functional` reads the weight itself."""

    def __init__(self, spelling: str, bias: bool = False, functional: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=bias)
        self.proj = nn.Linear(8, 8, bias=bias)
        self.spelling, self.functional = spelling, functional

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias) if self.functional else self.qkv(x)
        q, k, v = qkv.reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "einsum":
            scores = torch.einsum("bhqc,bhkc->bhqk", q, k) * 0.5
            y = torch.einsum("bhqk,bhkc->bhqc", scores.softmax(dim=-1), v)
        else:
            y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Vit(nn.Module):
    """Patch embedding, class token, position embedding, one block, head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 10, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = SelfAttention("matmul", bias=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        x = self.attention(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x[:, 0])


class Mixer(nn.Module):
    """MLP-Mixer: a contraction along the tokens, then along the channels, then a head on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4, bias=False)
        self.tokens = nn.Sequential(nn.Linear(9, 5, bias=False), nn.GELU(), nn.Linear(5, 9, bias=False))
        self.channels = nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 6, bias=False))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        return self.head(x.mean(dim=1))


class Window(nn.Module):
    """Shifted windows: roll, partition 8 x 8 into 4 x 4, attend inside, undo both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 1)
        self.attention = SelfAttention("sdpa")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.embed(x).permute(0, 2, 3, 1), shifts=(-2, -2), dims=(1, 2))
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        x = self.attention(x.reshape(-1, 16, channels))
        x = x.view(batch, height // 4, width // 4, 4, 4, channels).permute(0, 1, 3, 2, 4, 5)
        x = torch.roll(x.reshape(batch, height, width, channels), shifts=(2, 2), dims=(1, 2))
        return self.head(x)


class StandardConv2d(nn.Conv2d):
    """Weight-standardised convolution: the kernel is centred and scaled before use."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormStandardConv2d(nn.Conv2d):
    """Weight-standardised convolution as timm writes it: through `F.batch_norm`, with a gain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(rows, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        weight = rows.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class TwoInputs(nn.Module):
    """An image and a vector meet in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, padding=1)
        self.vector = nn.Linear(5, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.last(self.image(image).mean((2, 3)) + self.vector(vector))


class TwoOutputs(nn.Module):
    """A trunk with two heads; one head is returned in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 6, bias=False)
        self.one = nn.Linear(6, 3, bias=False)
        self.two = nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.trunk(x).relu()
        return self.one(x), {"aux": self.two(x)}


class DictInput(nn.Module):
    """The example inputs are keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(3, 6)
        self.last = nn.Linear(12, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(left), self.right(right)], dim=-1).tanh())


class Norms(nn.Module):
    """BatchNorm, GroupNorm and LayerNorm, affine and not, between bias-free layers."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.batch = nn.BatchNorm2d(8, affine=affine)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.group = nn.GroupNorm(2, 8, affine=affine)
        self.layer = nn.LayerNorm(8, elementwise_affine=affine)
        self.gate = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.first(x)).relu()
        x = self.group(self.second(x)).relu()
        x = self.layer(x.permute(0, 2, 3, 1))
        return self.head(x * self.gate(x))
