"""Vectors that numbers are multiplied by, as tables that tell the channels of what comes out."""

import pytest
import torch
from rewrite.compact.masked import assert_compacts, redrawn
from torch import Tensor, nn
from torch.nn import functional as F

from channels.grouping import Net, groups_of


class Numbers(nn.Module):
    """Each number of a table of data times a vector, beside tokens for kinds and one for the result."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(5, 12)), nn.Parameter(torch.ones(5, 12))
        self.first, self.kinds = nn.Parameter(torch.ones(1, 1, 12)), kinds
        self.tables = nn.ModuleList(nn.Embedding(7, 12) for _ in range(kinds))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.last = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor, *kinds: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1) * self.scale + self.shift
        others = [table(own) for table, own in zip(self.tables, kinds, strict=True)]
        y = torch.cat([self.first.expand(x.shape[0], -1, -1), tokens, *others], 1)
        packed = self.qkv(self.norms[0](y)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        y = y + self.out(F.scaled_dot_product_attention(*packed.unbind(0)).transpose(1, 2).flatten(2))
        return self.last((y + self.down(self.up(self.norms[1](y)).relu()))[:, 0])


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("kinds", [0, 2])
def test_numbers_times_vectors_lose_channels_with_what_reads_them(kinds: int, share: float) -> None:
    inputs = torch.randn(4, 5), *(torch.randint(0, 7, (4, 2)) for _ in range(kinds))
    small = assert_compacts(redrawn(Numbers(kinds)), inputs, share)
    width = small.get_parameter("scale").shape[1]
    assert width < 12
    assert small.get_parameter("shift").shape == (5, width)
    assert small.get_parameter("down.weight").shape[0] == width


def test_a_line_of_nothing_but_constants_has_the_channels_of_the_others() -> None:
    def forward(net: Net, one: Tensor, other: Tensor) -> Tensor:
        first = net.first.expand(one.shape[0], -1, -1)
        return net.last(torch.cat([first, net.one(one), net.other(other)], 1).mean(1).relu())

    tables = {"one": nn.Embedding(5, 4), "other": nn.Embedding(6, 4)}
    net = Net(forward, first=nn.Parameter(torch.ones(1, 1, 4)), last=nn.Linear(4, 2), **tables)
    groups = groups_of(net, (torch.zeros(2, 3).long(), torch.zeros(2, 2).long()))
    assert sorted(groups.columns["last.weight"].tolist()) == [0, 1, 2, 3]
