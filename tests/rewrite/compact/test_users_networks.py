"""Networks as users write them: channels go at random, and all that went with them is gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import Cases, adder, assert_compacts, assert_same, outputs, redrawn

CASES: Cases = {}
case = adder(CASES)


def edges() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 6), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])


@case(lambda: torch.randn(2, 6, 8))
class SelectiveStates(nn.Module):
    """A state-space layer whose state starts with zeros of the size of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Linear(8, 24), nn.Conv1d(12, 12, 3, groups=12, padding=2)
        self.steps, self.wide, self.out = nn.Linear(12, 11), nn.Linear(3, 12), nn.Linear(12, 8)
        self.decay, self.skip = nn.Parameter(torch.zeros(12, 4)), nn.Parameter(torch.ones(12))
        self.after = nn.Linear(8, 2)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.first(u).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        step, b, c = self.steps(x).split([3, 4, 4], -1)
        step = F.softplus(self.wide(step)).unsqueeze(-1)
        keep, new = torch.exp(step * -self.decay.exp()), step * b.unsqueeze(2)
        state, ys = torch.zeros(x.shape[0], x.shape[2], 4), []
        for t in range(u.shape[1]):
            state = keep[:, t] * state + new[:, t] * x[:, t].unsqueeze(-1)
            ys.append((state * c[:, t].unsqueeze(1)).sum(-1))
        return self.after(u + self.out((torch.stack(ys, 1) + x * self.skip) * F.silu(z)))


@case(lambda: (torch.randn(3, 6), torch.randint(0, 5, (3,))))
class Generator(nn.Module):
    """Conditional batch norms: the scales of an image that a vector was viewed as, from an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 32), nn.BatchNorm2d(8, affine=False)
        self.table, self.up, self.last = (
            nn.Embedding(5, 16),
            nn.ConvTranspose2d(8, 6, 4, 2, 1),
            nn.Conv2d(6, 3, 3),
        )

    def forward(self, z: Tensor, kind: Tensor) -> Tensor:
        scale, shift = self.table(kind).chunk(2, 1)
        x = self.norm(self.first(z).view(-1, 8, 2, 2))
        x = (x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]).relu()
        return self.last(self.up(x).relu()).tanh()


@case(lambda: torch.randint(0, 13, (2, 6)))
class TiedLanguageModel(nn.Module):
    """Token and position embeddings, a block, and the token table as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(13, 12), nn.Embedding(6, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in self.qkv(self.norms[0](x)).split(12, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return F.linear(self.norms[2](x), self.tokens.weight)


@case(edges)
class GraphSums(nn.Module):
    """Messages added into tensors of zeros that code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.edge, self.out = (
            nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(16, 8), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        source, target = pairs
        h = self.one(x)
        h = self.two(torch.zeros_like(h).index_add_(0, target, h[source]).relu())
        message = self.edge(torch.cat([h[source], h[target]], -1)).relu()
        return self.out(h + torch.zeros(h.shape[0], h.shape[1]).index_add(0, target, message))


@case(edges)
class GraphScatters(nn.Module):
    """Messages scattered into tensors that are made with sizes of another one, as torch-geometric does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        source, target = pairs
        for layer in (self.one, self.two):
            x = layer(x)
            message = x.index_select(0, source)
            zeros = message.new_zeros((x.size(0), message.size()[1]))
            x = zeros.scatter_add_(0, target.view(-1, 1).expand_as(message), message).relu()
        return self.out(x.new_zeros(x.shape).index_add(0, target, x[source]))


@case(edges)
class GraphAttention(nn.Module):
    """One weight for each head, which scales all channels of the head: heads go whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 12, bias=False), nn.Linear(12, 3)
        self.left, self.right = nn.Parameter(torch.zeros(1, 3, 4)), nn.Parameter(torch.zeros(1, 3, 4))

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        source, target = pairs
        h = self.first(x).view(-1, 3, 4)
        score = (h * self.left).sum(-1)[source] + (h * self.right).sum(-1)[target]
        weight = torch.exp(F.leaky_relu(score))
        weight = weight / torch.zeros(5, 3).index_add(0, target, weight)[target]
        y = torch.zeros(5, 3, 4).index_add(0, target, h[source] * weight.unsqueeze(-1))
        return self.out(F.elu(y.flatten(1)))


@case(lambda: torch.randn(2, 3, 10))
class Aligned(nn.Module):
    """A matrix for each sample, made by a layer, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.matrix = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 12, 1), nn.Linear(12, 64)
        self.after, self.out = nn.Conv1d(8, 10, 1), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        h = torch.bmm(self.matrix(self.wide(h).relu().amax(-1)).view(-1, 8, 8) + torch.eye(8), h)
        y = self.after(h).relu()
        return self.out(torch.cat([y.amax(-1), y.mean(-1)], 1))


@case(lambda: torch.randn(2, 3, 8, 8))
class SelectiveKernels(nn.Module):
    """Branches weighed by a softmax over branches, for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=2, dilation=2)
        self.squeeze, self.out = nn.Linear(8, 4), nn.Conv2d(8, 3, 1)
        self.weigh = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.small(x).relu(), self.large(x).relu()], 1)
        z = self.squeeze(both.sum(1).mean((-1, -2))).relu()
        weights = torch.stack([layer(z) for layer in self.weigh], 1).softmax(1)
        return self.out((both * weights[..., None, None]).sum(1))


@case(lambda: (torch.randn(3, 6), torch.randn(3, 5)))
class Twins(nn.Module):
    """A bilinear layer, and the cosine between what two layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Linear(6, 8), nn.Linear(5, 8), nn.Bilinear(8, 8, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.left(x).relu(), self.right(y).relu()
        return self.out(self.both(a, b).relu()), F.cosine_similarity(a, b)


@case(lambda: torch.randn(2, 3, 3, 6, 6))
class ConvolutionalStates(nn.Module):
    """A recurrent convolution by hand, whose first state is joined with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.out = nn.Conv2d(9, 24, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6, *x.shape[-2:])
        c = torch.zeros_like(h)
        for step in range(x.shape[1]):
            take, keep, out, new = self.gates(torch.cat([x[:, step], h], 1)).chunk(4, 1)
            c = keep.sigmoid() * c + take.sigmoid() * new.tanh()
            h = out.sigmoid() * c.tanh()
        return self.out(h)


@case(lambda: torch.randn(2, 3, 8, 8))
class Largest(nn.Module):
    """The largest over two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).unflatten(1, (2, 6)).amax(1))


@case(lambda: torch.randn(2, 3, 6, 6))
class ShufflesGroups(nn.Module):
    """A grouped convolution each of whose groups goes as a whole, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.deep, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(16, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = y.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        left, right = self.grouped(y).relu().chunk(2, 1)
        y = F.channel_shuffle(torch.cat([left, self.deep(right)], 1), 2)
        z: Tensor = self.out(self.wide(y).relu())
        return z


@case(lambda: torch.randn(2, 3, 8, 8))
class Samples(nn.Module):
    """Reads an image at places that a layer with one channel per coordinate gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 2, 3, padding=1)
        self.turn, self.out = nn.Linear(12, 6), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = F.grid_sample(y, self.places(y).permute(0, 2, 3, 1).tanh(), align_corners=False)
        grid = F.affine_grid(self.turn(y.mean((2, 3))).view(-1, 2, 3), list(x.shape), align_corners=False)
        z: Tensor = self.out(F.grid_sample(y, grid, align_corners=False))
        return z


@case(lambda: torch.randn(2, 9, 6))
class StartsWithZeros(nn.Module):
    """A cell whose second state is made like its first one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = nn.Linear(6, 10), nn.LSTMCell(10, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 12)
        cell = torch.zeros_like(state)
        for step in range(3):
            state, cell = self.cell(self.first(x[:, step]).relu(), (state, cell))
        z: Tensor = self.out(state)
        return z


@case(lambda: (torch.randn(2, 9, 6), torch.randint(0, 9, (2, 4))))
class GathersTokens(nn.Module):
    """Picks tokens by an index that is repeated for every channel, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        y = self.first(x).relu()
        some = y.gather(1, kept[..., None].expand(-1, -1, y.shape[-1]))
        more = torch.gather(y, 1, kept.unsqueeze(-1).repeat(1, 1, 16))
        best = y.norm(dim=-1).topk(4, 1).indices
        third = torch.gather(y, 1, best[..., None].expand(-1, -1, y.size(-1)))
        z: Tensor = self.out(some + more + third)
        return z


@pytest.mark.thinned(4)
@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("kind", sorted(CASES))
def test_channels_go_with_all_that_belongs_to_them(kind: str, share: float) -> None:
    build, inputs = CASES[kind]
    torch.manual_seed(0)
    assert_compacts(redrawn(build()), inputs(), share)


class Bags(nn.Module):
    """An embedding whose vectors go straight into a recurrent layer, or are added up."""

    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.table: nn.Module = nn.EmbeddingBag(11, 8, mode="sum") if bag else nn.Embedding(11, 8)
        self.next: nn.Module = nn.Linear(8, 6) if bag else nn.GRU(8, 6, batch_first=True)
        self.bag, self.out = bag, nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.next(self.table(tokens))
        return self.out(x if self.bag else x[0][:, -1])


@pytest.mark.thinned(4)
@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("sides", ["both", "rows"])
def test_an_embedding_loses_channels(bag: bool, sides: str) -> None:
    model, tokens = redrawn(Bags(bag)), torch.randint(0, 11, (3, 5))
    groups = fxprune.channel_groups(model, tokens)
    column = next(g for g in groups if any(m.parameter == "table.weight" for m in g.members))
    assert column.removable
    assert column.size == 0
    small = assert_compacts(model, tokens, 0.5, "magnitude", sides=sides)
    table: Any = small.get_submodule("table")
    assert table.embedding_dim == table.weight.shape[1] < 8
    assert table.weight.shape[0] == 11


class Scaled(nn.Module):
    """Heads scaled by one number each, which a layer gives, while their channels go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.out = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.first(x).view(-1, 3, 4) * self.gate(x).unsqueeze(-1)).flatten(1))


def test_a_head_that_is_scaled_stays_while_its_gate_does() -> None:
    model, x = redrawn(Scaled()), torch.randn(5, 6)
    with torch.no_grad():
        model.out.weight[:, :4] = 0
        model.out.weight[:, 7] = 0
        model.out.weight[:, 11] = 0
    small = fxprune.compact(model, x)
    assert_same(outputs(model, x), outputs(small, x))
    assert small.get_submodule("first").out_features == 9
    assert small.get_submodule("gate").out_features == 3


def test_a_network_without_a_batch_loses_channels() -> None:
    """Layers that are given one vector, as where a network computes the weights of another."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert_compacts(redrawn(net), torch.randn(5), 0.4)


class Auxiliary(nn.Module):
    """A second classifier that only training asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.side, self.second = nn.Linear(10, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.stem(x).relu()
        out = self.head(self.body(y).relu())
        return (out, self.second(self.side(y).relu())) if self.training else out


@pytest.mark.thinned(2)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_outputs_of_training_alone_stay_what_they_were(share: float) -> None:
    model, x = redrawn(Auxiliary()), torch.randn(5, 6)
    small = assert_compacts(model, x, share)
    assert small.get_submodule("side").out_features < 9
    assert small.get_submodule("second").out_features == 3
    pruned = fxprune.apply(
        model, "random", share, granularity="channel", example_inputs=x, progress=False, seed=1
    )
    with torch.no_grad():  # in float32, and in the mode of training
        assert_same(list(pruned.train()(x)), list(small.train()(x)), 1e-5)
    held = {group.reason for group in fxprune.channel_groups(model, x) if not group.removable}
    assert held == {"output: an output of the network", "an output of the network in training"}
