"""ChannelSlice groups of whole networks: families, members, weights that stay."""

import pytest
import torch
from nets import NETS
from torch import nn

from channels.grouping import Net, groups_of, tables
from fxprune.channels.groups import ChannelSlice


def rows_of(net: str) -> dict[str, list[int]]:
    torch.manual_seed(0)
    own = tables(groups_of(*NETS[net]()))
    return {name: numbers for name, numbers in own.items() if not name.endswith(".in")}


@pytest.mark.parametrize(
    ("net", "same"),
    [
        ("residual", ["0", "1.body"]),
        ("depthwise", ["0", "1"]),
        ("excite_sigmoid", ["first", "expand"]),
        ("glu", ["left", "right"]),
        ("vit", ["embed", "attention.proj", "mlp.3"]),
        ("mixer", ["embed", "channels.2"]),
        ("two_inputs", ["image", "vector"]),
        ("reused", ["stem", "block"]),
    ],
)
def test_channels_that_meet_are_tied(net: str, same: list[str]) -> None:
    rows = rows_of(net)
    assert all(rows[name] == rows[same[0]] for name in same)
    assert len(set(rows[same[0]])) == len(rows[same[0]])
    others = {number for name, own in rows.items() if name not in same for number in own} - {-1}
    assert not others & set(rows[same[0]])


def test_chains_are_not_tied() -> None:
    for net in ("mlp", "conv_chain", "dense", "flatten", "adaptive_pool"):
        numbers = [number for own in rows_of(net).values() for number in own if number >= 0]
        assert numbers == list(range(len(numbers)))


def test_outputs_and_what_meets_an_input_stay() -> None:
    assert rows_of("projection") == {"project": [-1] * 8, "body.0": [0, 1, 2, 3, 4, 5], "body.2": [-1] * 8}
    assert set(rows_of("two_outputs")["one"] + rows_of("two_outputs")["two"]) == {-1}
    assert rows_of("multihead")["attention.out_proj"] == [-1] * 8


def test_halves_of_a_gated_unit_and_shuffled_channels() -> None:
    assert rows_of("glu")["wide"] == [0, 1, 2, 3, 4, 5] * 2
    # `first` in two groups, shuffled to 0 4 1 5 | 2 6 3 7, read in two groups: one of each quarter.
    assert rows_of("shuffle") == {
        "first": [0, 1, 0, 1, 0, 1, 0, 1], "depth": [0, 0, 1, 1, 0, 0, 1, 1], "last": [-1] * 4
    }  # fmt: skip


def test_grouped_convolutions_lose_equally_many_per_group() -> None:
    net = Net(
        lambda net, x: net.last(net.group(net.first(x))),
        first=nn.Conv2d(3, 6, 1), group=nn.Conv2d(6, 4, 1, groups=2), last=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert tables(groups_of(net, torch.randn(2, 3, 4, 4))) == {
        "first": [0, 1, 2, 0, 1, 2], "group": [3, 4, 3, 4], "last": [-1] * 2,
        "first.in": [-1] * 3, "group.in": [0, 1, 2, 0, 1, 2], "last.in": [3, 4, 3, 4],
    }  # fmt: skip


def test_a_group_norm_loses_equally_many_per_part() -> None:
    net = Net(
        lambda net, x: net.last(net.norm(net.first(x))),
        first=nn.Conv2d(3, 4, 1), norm=nn.GroupNorm(2, 4), last=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert tables(groups_of(net, torch.randn(2, 3, 4, 4)))["first"] == [0, 1, 0, 1]


def test_depthwise_multipliers_go_with_their_input() -> None:
    net = Net(
        lambda net, x: net.last(net.depth(net.first(x))),
        first=nn.Conv2d(3, 2, 1), depth=nn.Conv2d(2, 4, 3, groups=2), last=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    own = tables(groups_of(net, torch.randn(2, 3, 4, 4)))
    assert [own[n] for n in ("first", "depth", "depth.in", "last.in")] == [
        [0, 1], [0, 0, 1, 1], [0, 1], [0, 0, 1, 1]
    ]  # fmt: skip


def test_an_excluded_layer_holds_its_partners() -> None:
    torch.manual_seed(0)
    net, inputs = NETS["residual"]()
    groups = groups_of(net, inputs, fixed=["1.body.weight"])
    assert groups.count == 0
    assert all(set(own) == {-1} for own in tables(groups).values())
    assert "1.body.weight is excluded" in groups.labels.reasons.values()


def test_members_families_and_weights() -> None:
    torch.manual_seed(0)
    net, inputs = NETS["excite_sigmoid"]()
    groups = groups_of(net, inputs)
    assert groups.families.tolist() == [0] * 8 + [8] * 4
    assert groups.members(2) == [
        ChannelSlice("first.weight", "out", (2,)), ChannelSlice("expand.weight", "out", (2,)),
        ChannelSlice("reduce.weight", "in", (2,)), ChannelSlice("last.weight", "in", (2,)),
    ]  # fmt: skip
    alive = torch.ones(12, dtype=torch.bool)
    alive[[2, 9]] = False  # channel 2 of `first`, and channel 1 of `reduce`
    expected = torch.ones(8, 4, dtype=torch.bool)
    expected[2], expected[:, 1] = False, False
    assert torch.equal(groups.kept("expand.weight", alive).flatten(1), expected)


def test_weights_of_a_grouped_transposed_convolution() -> None:
    torch.manual_seed(0)
    groups = groups_of(*NETS["transposed"]())
    assert tables(groups)["1"] == [6, 7, 6, 7]
    alive = torch.ones(groups.count, dtype=torch.bool)
    alive[6] = False  # channels 0 and 2 of layer 1, in either group of layer 2
    # (in, out / groups, taps) of layer 1, one group: columns 0 and 2 go; of layer 2: inputs 0 and 2.
    one, two = groups.kept("1.weight", alive), groups.kept("2.weight", alive)
    assert one.flatten(2).all(2).tolist() == [[False, True, False, True]] * 6
    assert two.flatten(2).all(2).tolist() == [[False] * 2, [True] * 2] * 2
