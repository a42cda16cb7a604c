"""Networks that mix, shift and aggregate in their own code: one group of each kind goes, and 30 and 60 %."""

from __future__ import annotations

import copy

import pytest
import torch
from channels.removal import zero_group
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from rewrite.compact.masked import Cases, adder, assert_compacts, assert_same, outputs, redrawn

CASES: Cases = {}
case = adder(CASES)


@case(lambda: torch.randn(2, 3, 8, 8))
class Aggregated(nn.Module):
    """Features summed up by cluster (NetVLAD): clusters and features become one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.assign, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1), nn.Linear(60, 4)
        self.centres = nn.Parameter(torch.rand(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        share = self.assign(x).flatten(2).softmax(1)
        sums = torch.einsum("bkn,bcn->bkc", share, x.flatten(2))
        y = F.normalize(sums - share.sum(-1).unsqueeze(-1) * self.centres, dim=2).flatten(1)
        out: Tensor = self.last(F.normalize(y, dim=1))
        return out


@case(lambda: torch.randn(3, 6))
class MadeMatrix(nn.Module):
    """A layer makes a matrix, which multiplies the input: its rows are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrix, self.last = nn.Linear(6, 5), nn.Linear(5, 8 * 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(self.first(x).relu()).view(-1, 8, 6)
        out: Tensor = self.last(torch.bmm(matrix, x.unsqueeze(-1)).squeeze(-1).relu())
        return out


@case(lambda: torch.randn(2, 6, 8))
class GatedPlaces(nn.Module):
    """A convolution over places of one tap mixes tokens (gMLP): features pass it as its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.norm = nn.Linear(8, 12), nn.Linear(12, 20), nn.LayerNorm(10)
        self.places, self.down, self.last = nn.Conv1d(6, 6, 1), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        out: Tensor = self.last((x + self.down(u * self.places(self.norm(v)))).mean(1))
        return out


@case(lambda: torch.randn(2, 2, 4, 6, 6))
class Shifted(nn.Module):
    """Some channels are written one step later in time, some one step earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(2, 8, (1, 3, 3)), nn.BatchNorm3d(8)
        self.middle, self.last = nn.Conv3d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        y = x.clone()
        y[:, :3, 1:] = x[:, :3, :-1]
        y[:, 3:5, :-1] = x[:, 3:5, 1:]
        out: Tensor = self.last((x + self.middle(y).relu().mean(1, keepdim=True)).amax((2, 3, 4))[:, :6])
        return out


@case(lambda: torch.randn(2, 3, 8, 8))
class Windows(nn.Module):
    """Windows of an image, whose number the code computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.last = nn.Conv2d(3, 12, 1), nn.Linear(12, 36), nn.Linear(12, 4)
        self.register_buffer("hidden", torch.zeros(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).view(b, 4, 3, 16, 16) + self.hidden[None, :, None]
        y = (scores.view(-1, 3, 16, 16).softmax(-1) @ v).transpose(1, 2).reshape(b, -1, c)
        out: Tensor = self.last(y.mean(1))
        return out


@case(lambda: torch.randn(2, 6, 8))
class Mixer(nn.Module):
    """Layers along tokens, whose positions are the channels of others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(8, 12), nn.Linear(6, 10), nn.Linear(10, 6)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(F.gelu(self.up(x.mT))).mT
        out: Tensor = self.last(x.mean(1))
        return out


@case(lambda: torch.randn(2, 6))
class BehindEquation(nn.Module):
    """A layer by einsum, whose equation stands before what it reads, and one with its weight there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(7, 3)
        self.one, self.two = nn.Parameter(torch.rand(8, 9)), nn.Parameter(torch.rand(7, 9))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,io->bo", self.first(x).relu(), self.one).relu()
        out: Tensor = self.last(torch.einsum("oi,bi->bo", self.two, y).relu())
        return out


@case(lambda: torch.randn(3, 6))
class Distances(nn.Module):
    """Distances to centres: the function makes a difference of its own, which no node yields."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(7, 4)
        self.centres = nn.Parameter(torch.rand(7, 12))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.exp(-(torch.cdist(self.first(x).tanh(), self.centres) ** 2) / 12))
        return out


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("kind", sorted(CASES))
def test_channels_go_with_all_that_belongs_to_them(kind: str, share: float) -> None:
    build, inputs = CASES[kind]
    torch.manual_seed(0)
    net, x = redrawn(build()), inputs()
    small = assert_compacts(net, x, share)
    assert small.meta["fxprune"]["recipes"][0].unwritable == ""


@pytest.mark.parametrize("kind", sorted(CASES))
def test_one_group_of_each_kind_is_all_that_goes(kind: str) -> None:
    """The figures of the listing are those of the smaller network."""
    build, inputs = CASES[kind]
    torch.manual_seed(0)
    net, x = redrawn(build()), inputs()
    graph = fxprune.lower(fxprune.capture(net, x))
    kinds = {}
    for group in fxprune.channel_groups(net, x):
        if group.removable:
            make = tuple((member.parameter, member.axis, len(member.indices)) for member in group.members)
            kinds[make] = group
    assert kinds
    for group in kinds.values():
        zeroed = copy.deepcopy(net)
        zero_group(zeroed, graph, group)
        small = fxprune.compact(zeroed, x)
        table = small.meta["fxprune"]["compaction"]
        assert table.given_back == 0, str(table)
        assert table.parameters[0] - table.parameters[1] == group.parameters
        assert table.macs[0] - table.macs[1] == group.macs
        assert_same(outputs(zeroed, x), outputs(small, x))


def test_a_centre_that_is_not_zero_counts_in_a_distance() -> None:
    torch.manual_seed(0)
    net, x = redrawn(Distances()), torch.randn(3, 6)
    with torch.no_grad():
        net.get_parameter("first.weight")[[1, 4]], net.get_parameter("first.bias")[[1, 4]] = 0.0, 0.0
        net.get_parameter("centres")[:, 4] = 0.0
    small = fxprune.compact(net, x, verify=False)
    torch.testing.assert_close(small(x), net(x))
    assert len(small.get_parameter("first.weight")) == 11


def test_rows_of_a_matrix_and_features_along_places_may_go() -> None:
    """Entries of the input, and the positions of the layer, cannot."""
    for kind, parameter, axis, count in (
        ("MadeMatrix", "matrix.weight", "out", 8),
        ("GatedPlaces", "down.weight", "in", 10),
    ):
        build, inputs = CASES[kind]
        groups = fxprune.channel_groups(build(), inputs())
        free = [member for group in groups if group.removable for member in group.members]
        assert sum(member.parameter == parameter and member.axis == axis for member in free) == count


class Fourier(nn.Module):
    """A layer on the low frequencies, by einsum with a complex weight, written into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 7, 1), nn.Conv2d(7, 4, 1)
        self.weight = nn.Parameter(torch.rand(8, 7, 3, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        waves = torch.fft.rfft2(x)
        low = torch.zeros(len(x), 7, x.size(-2), x.size(-1) // 2 + 1, dtype=torch.cfloat)
        low[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", waves[:, :, :3, :3], self.weight)
        out: Tensor = self.last((torch.fft.irfft2(low, s=x.shape[-2:]) + self.beside(x)).relu())
        return out


@pytest.mark.parametrize("side", ["in", "out"])
def test_what_a_fourier_layer_reads_and_writes_goes(side: str) -> None:
    torch.manual_seed(0)
    net, x = Fourier().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        if side == "in":
            net.first.weight[:3], net.get_parameter("first.bias")[:3] = 0.0, 0.0
        else:
            net.last.weight[:, :3] = 0.0
    small = fxprune.compact(net, x, verify=False)
    for one in (x, torch.randn(3, 3, 10, 12)):
        torch.testing.assert_close(small(one), net(one), rtol=1e-4, atol=1e-5)
    assert small.get_parameter("weight").shape == ((5, 7, 3, 3) if side == "in" else (8, 4, 3, 3))
    assert small.meta["fxprune"]["compaction"].given_back == 0


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_channels_of_a_fourier_layer_go(share: float) -> None:
    torch.manual_seed(0)
    net, x = Fourier().eval(), torch.randn(2, 3, 8, 8)
    pruned = fxprune.apply(
        net, "random", share, granularity="channel", example_inputs=x, progress=False, seed=1
    )
    small = fxprune.compact(pruned, x)
    torch.testing.assert_close(small(x), pruned(x), rtol=1e-4, atol=1e-5)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    masks, parameters = fxprune.masks(pruned), dict(small.named_parameters())
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: parameters[name].numel() for name in masks
    }
