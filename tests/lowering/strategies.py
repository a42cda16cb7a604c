"""Networks drawn at random out of the blocks that real ones are made of.

An :class:`Architecture` is a start (``"image"``, ``"tokens"`` or ``"vector"``) and a list of integers, one
per block: the integer says which of the blocks that fit the shape at hand comes next, and how it looks. So
any list is a network, hypothesis shrinks it by leaving numbers out, and its repr rebuilds it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]  # of one sample: (channels, height, width), (tokens, channels) or (channels,)
STARTS: dict[str, Shape] = {"image": (4, 5, 6), "tokens": (5, 6), "vector": (6,)}


class Block(nn.Module):
    """A part of a network that knows its output's shape."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__()
        self.dice, self.shape = dice, shape

    def chance(self, probability: float = 0.5) -> bool:
        return self.dice.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.dice.choice(choices)


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Tanh, nn.Identity, lambda: nn.LeakyReLU(0.1),
)  # fmt: skip


# ---------------------------------------------------------------- images
def _groups(block: Block, *channels: int) -> int:
    return block.pick(*[g for g in (1, 1, 2, 3, 4) if all(c % g == 0 for c in channels)])


class Conv(Block):
    """Any convolution: stride, padding, dilation, groups, padding modes, bias or not."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        channels, side = shape[0], min(shape[1:])
        out = self.pick(2, 3, 4, 6, 8)
        kernel = (self.pick(1, 2, 3), self.pick(1, 3, 3))
        dilation = self.pick(1, 1, 2)
        padding = self.pick(0, 1, 1, 2) if side > 4 else 2
        mode = self.pick("zeros", "zeros", "zeros", "reflect", "circular") if side > 2 else "zeros"
        self.layer = nn.Conv2d(
            channels, out, kernel, self.pick(1, 1, 2), padding, dilation, _groups(self, channels, out),
            bias=self.chance(), padding_mode=mode,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Depthwise(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        channels = shape[0]
        out = channels * (2 if channels <= 4 and self.chance() else 1)
        self.layer = nn.Conv2d(channels, out, 3, 1, 1, groups=channels, bias=self.chance())
        self.point = nn.Conv2d(out, channels, 1, bias=self.chance())

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.layer(x).relu())


class Transposed(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        channels, stride = shape[0], self.pick(1, 2) if max(shape[1:]) <= 4 else 1
        out = self.pick(2, 3, 4)
        self.layer = nn.ConvTranspose2d(
            channels, out, self.pick(2, 3), stride, self.pick(0, 1) if min(shape[1:]) > 2 else 0,
            output_padding=stride - 1, groups=_groups(self, channels, out), bias=self.chance(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Residual(Block):
    """Two convolutions beside the skip, with or without norms, with or without a projection."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        channels, out = shape[0], self.pick(shape[0], shape[0], 4)
        stride = self.pick(1, 2) if out != channels and min(shape[1:]) > 2 else 1
        bias = self.chance()
        norm = self.pick(nn.Identity, nn.BatchNorm2d, lambda c: nn.BatchNorm2d(c, affine=False))
        self.body = nn.Sequential(
            nn.Conv2d(channels, 4, 3, stride, 1, bias=bias), norm(4), nn.ReLU(),
            nn.Conv2d(4, out, 3, 1, 1, groups=_groups(self, 4, out), bias=bias),
        )  # fmt: skip
        plain = out == channels and stride == 1
        self.skip = nn.Identity() if plain else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class Concat(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.layer = nn.Conv2d(shape[0], self.pick(1, 2), 3, padding=1, bias=self.chance())
        self.first = self.chance()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        return torch.cat([y, x] if self.first else [x, y], 1)


class Split(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.left = self.dice.randrange(1, shape[0])
        self.layer = nn.Conv2d(self.left, self.pick(1, 2, 3), 1, bias=self.chance())

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split([self.left, x.shape[1] - self.left], 1)
        return torch.cat([right, self.layer(left)], 1)


class Shuffle(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.groups = self.pick(*[g for g in (1, 2, 3, 4) if shape[0] % g == 0])
        self.by_hand = self.chance()

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_hand:
            return F.channel_shuffle(x, self.groups)
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


class Excite(Block):
    """Squeeze-and-excite with any gate, biases or not."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        bias = self.chance()
        self.reduce, self.expand = nn.Conv2d(shape[0], 3, 1, bias=bias), nn.Conv2d(3, shape[0], 1, bias=bias)
        self.gate = self.pick(*ACTIVATIONS)()
        self.squeeze = self.pick(
            lambda x: x.mean((2, 3), keepdim=True), lambda x: F.adaptive_avg_pool2d(x, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.reduce(self.squeeze(x)).relu()))


class Pool(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.layer = self.pick(
            lambda: nn.MaxPool2d(2, ceil_mode=True), lambda: nn.MaxPool2d(3, 2, padding=1),
            lambda: nn.AvgPool2d(2, ceil_mode=True), lambda: nn.AvgPool2d(3, 1, padding=1),
            lambda: nn.AdaptiveAvgPool2d((2, 3)), lambda: nn.AdaptiveMaxPool2d(2),
        )()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Resized(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.mode = self.pick("nearest", "bilinear")

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "nearest":
            return F.interpolate(F.max_pool2d(x, 2, ceil_mode=True), scale_factor=2)
        return F.interpolate(x, size=(4, 4), mode="bilinear", align_corners=False)


class ImageNorm(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        channels = shape[0]
        self.norm = self.pick(
            lambda: nn.BatchNorm2d(channels), lambda: nn.BatchNorm2d(channels, affine=False),
            lambda: nn.GroupNorm(1, channels), nn.Identity,
        )()  # fmt: skip
        self.act = self.pick(*ACTIVATIONS)()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class Padded(Block):
    """Zeros around the image, a shift, or patches put side by side."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.kind = self.pick("pad", "roll", "depth", "crop")
        self.layer = nn.Conv2d(shape[0] * (4 if self.kind == "depth" else 1), 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pad":
            x = F.pad(x, (1, 0, 0, 1))
        elif self.kind == "roll":
            x = x.roll((1, -1), (2, 3))
        elif self.kind == "depth":
            x = F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)
        elif min(x.shape[2:]) > 1:
            x = x[:, :, 1:, :-1]
        return self.layer(x)


class ToTokens(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Flattened(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.layer = nn.Linear(torch.Size(shape).numel(), self.pick(4, 6), bias=self.chance())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


# ---------------------------------------------------------------- channels last: tokens and vectors
class Dense(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.layer, self.act = (
            nn.Linear(shape[-1], self.pick(2, 4, 6, 8), bias=self.chance()),
            self.pick(*ACTIVATIONS)(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Perceptron(Block):
    """A residual branch of two layers, gated or not, with or without a norm."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        width, bias = shape[-1], self.chance()
        self.norm = self.pick(nn.Identity(), nn.LayerNorm(width), nn.LayerNorm(width, bias=False))
        self.gated = self.pick("no", "glu", "product")
        self.up = nn.Linear(width, 8, bias=bias)
        self.down = nn.Linear(8 if self.gated == "no" else 4, width, bias=bias)
        self.scale = nn.Parameter(torch.full((width,), 1e-5)) if self.chance(0.3) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        if self.gated == "glu":
            y = F.glu(y, -1)
        elif self.gated == "product":
            left, right = y.chunk(2, -1)
            y = left * F.silu(right)
        y = self.down(y)
        return x + (y if self.scale is None else self.scale * y)


class Tied(Block):
    """One weight in two layers, or transposed; or one module called twice."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        width = shape[-1]
        self.kind = self.pick("tied", "transposed", "reused")
        self.one = nn.Linear(width, width, bias=False)
        self.two = nn.Linear(width, width, bias=self.chance())
        if self.kind == "tied":
            self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        if self.kind == "transposed":
            return self.two(x) + F.linear(y, self.one.weight.t())
        return self.two(self.one(y) if self.kind == "reused" else y) + x


class Attention(Block):
    """Softmax attention in several spellings, causal or not, with or without biases."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        width = shape[-1]
        self.heads = self.pick(*[h for h in (1, 2) if width % h == 0])
        self.spelling = self.pick("sdpa", "matmul", "einsum", "module")
        self.causal, bias = self.chance(0.3), self.chance()
        if self.spelling == "module":
            self.inner = nn.MultiheadAttention(width, self.heads, bias=bias, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        blocked = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if self.causal else None
        if self.spelling == "module":
            return x + self.inner(x, x, x, attn_mask=blocked, need_weights=False)[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            by_hand = self.spelling == "matmul"
            scores = q @ k.transpose(-2, -1) if by_hand else torch.einsum("bhqc,bhkc->bhqk", q, k)
            if blocked is not None:
                scores = scores.masked_fill(blocked, -torch.inf)
            weights = scores.softmax(-1)
            y = weights @ v if by_hand else torch.einsum("bhqk,bhkc->bhqc", weights, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class TokenMixer(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.layer, self.skip = nn.Linear(shape[0], shape[0], bias=self.chance()), self.chance()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return x + y if self.skip else y


class ClassToken(Block):
    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.token = nn.Parameter(torch.zeros(1, 1, shape[1]))
        self.position = nn.Parameter(torch.zeros(1, shape[0] + 1, shape[1])) if self.chance() else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return x if self.position is None else x + self.position


class Sequence1d(Block):
    """A convolution over the tokens."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        width = shape[1]
        groups = self.pick(1, width)
        self.layer = nn.Conv1d(width, width, 3, padding=1, groups=groups, bias=self.chance())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x.transpose(1, 2)).transpose(1, 2)


class Picked(Block):
    """From tokens to a vector: one of them, their mean, their maximum."""

    def __init__(self, dice: random.Random, shape: Shape) -> None:
        super().__init__(dice, shape)
        self.how = self.pick("first", "mean", "max", "cat")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cat":
            return torch.cat([x[:, 0], x[:, -1]], -1)
        return x[:, 0] if self.how == "first" else x.mean(1) if self.how == "mean" else x.amax(1)


IMAGE_BLOCKS: tuple[type[Block], ...] = (
    Conv, Conv, Depthwise, Transposed, Residual, Residual, Concat, Split, Shuffle, Excite, Pool, Resized,
    ImageNorm, Padded, ToTokens, Flattened,
)  # fmt: skip
VECTOR_BLOCKS: tuple[type[Block], ...] = (Dense, Perceptron, Tied)
TOKEN_BLOCKS: tuple[type[Block], ...] = (
    Dense, Perceptron, Tied, Attention, Attention, Attention, TokenMixer, ClassToken, Sequence1d, Picked,
    Flattened,
)  # fmt: skip
MENU = {3: IMAGE_BLOCKS, 2: TOKEN_BLOCKS, 1: VECTOR_BLOCKS}


@dataclass(frozen=True)
class Architecture:
    """List the parts of a drawn network; ``Architecture("image", (3, 14)).build()`` makes it, weights too."""

    start: str
    blocks: tuple[int, ...]

    def build(self, menu: Mapping[int, tuple[type[Block], ...]] = MENU) -> tuple[nn.Sequential, Tensor]:
        """The network, of blocks of ``menu``, in evaluation mode, and its example input (batch 2)."""
        torch.manual_seed(len(self.blocks))
        shape = STARTS[self.start]
        layers: list[nn.Module] = []
        for number in self.blocks:
            dice = random.Random(number)
            block = dice.choice(menu[len(shape)])(dice, shape).eval()
            with torch.no_grad():
                after = tuple(block(torch.zeros(2, *shape)).shape[1:])
            if (len(after) == 3 and (after[0] > 12 or max(after[1:]) > 8)) or after[-1] > 16:
                continue  # too large
            layers.append(block)
            shape = after
        last = (
            nn.Conv2d(shape[0], 2, 1, bias=False) if len(shape) == 3 else nn.Linear(shape[-1], 2, bias=False)
        )
        model = nn.Sequential(*layers, last).eval()
        return model, torch.randn(2, *STARTS[self.start])


def architectures(start: str, longest: int = 6) -> st.SearchStrategy[Architecture]:
    numbers = st.lists(st.integers(0, 2**16), min_size=1, max_size=longest)
    return st.builds(lambda blocks: Architecture(start, tuple(blocks)), numbers)
