"""Channels through data movement, elementwise operations and pooling; right values by hand."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from channels.grouping import Net, groups_of, tables

IMAGE, VECTOR = (
    torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
    torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def found(net: Net, inputs: Any, *names: str) -> list[list[int]]:
    own = tables(groups_of(net.eval(), inputs))
    return [own[name] for name in names]


def beside_skip(double: Any, inputs: int = 2) -> Net:
    """Two channels, made four by `double`, plus four of a skip."""
    return Net(
        lambda net, x: net.last(double(net.first(x)) + net.skip(x)),
        first=conv(3, inputs), skip=conv(3, 4), last=conv(4, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("double", "skip"),
    [
        (lambda y: torch.cat([y, y], 1), [0, 1, 0, 1]),
        (lambda y: y.repeat(1, 2, 1, 1), [0, 1, 0, 1]),
        (lambda y: torch.cat([y, y.flip(1)], 1), [0, 1, 1, 0]),
        (lambda y: y.repeat_interleave(2, 1), [0, 0, 1, 1]),
    ],
)
def test_a_channel_that_is_copied_ties_all_that_its_copies_meet(double: Any, skip: list[int]) -> None:
    names = ("first", "skip", "last.in", "skip.in")
    assert found(beside_skip(double), IMAGE, *names) == [[0, 1], skip, skip, [-1] * 3]


def test_zeros_that_are_filled_in_go_with_what_they_meet() -> None:
    # As in the shortcuts of CIFAR's ResNet: two channels, with one of zeros on each side.
    net = beside_skip(lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)))
    assert found(net, IMAGE, "first", "skip", "last.in") == [[0, 1], [2, 0, 1, 3], [2, 0, 1, 3]]


def test_pixel_shuffle_beside_a_skip() -> None:
    net = Net(
        lambda net, x: net.last(F.pixel_shuffle(net.first(x), 2) + net.skip(x).repeat(1, 1, 2, 2)),
        first=conv(3, 8), skip=conv(3, 2), last=conv(2, 2),
    )  # fmt: skip
    expected = [[0] * 4 + [1] * 4, [0, 1], [0, 1]]
    assert found(net, IMAGE, "first", "skip", "last.in") == expected


def test_pixel_unshuffle_gives_a_channel_several_columns() -> None:
    net = Net(lambda net, x: net.last(F.pixel_unshuffle(net.first(x), 2)), first=conv(3, 2), last=conv(8, 2))
    assert found(net, IMAGE, "first", "last.in") == [[0, 1], [0] * 4 + [1] * 4]


@pytest.mark.parametrize("last", [conv(2, 2), nn.ConvTranspose2d(2, 2, 2)])
def test_rows_that_become_one_image_channel_go_together(last: nn.Module) -> None:
    net = Net(lambda net, x: net.last(net.first(x).view(-1, 2, 2, 2)), first=nn.Linear(5, 8), last=last)
    assert found(net, VECTOR, "first", "last.in") == [[0] * 4 + [1] * 4, [0, 1]]


def test_rows_that_are_added_to_an_image() -> None:
    net = Net(
        lambda net, x, image: net.last(net.first(x).view(-1, 2, 2, 2) + net.image(image)),
        first=nn.Linear(5, 8), image=conv(3, 2), last=conv(2, 2),
    )  # fmt: skip
    inputs = (VECTOR, torch.randn(2, 3, 2, 2))
    assert found(net, inputs, "first", "image", "last.in") == [[0] * 4 + [1] * 4, [0, 1], [0, 1]]


def test_branches_beside_each_other_meet_in_one_channel() -> None:
    net = Net(
        lambda net, x: net.last(torch.cat([net.left(x), net.right(x)], 2)),
        left=conv(3, 2), right=conv(3, 2), last=conv(2, 2),
    )  # fmt: skip
    assert found(net, IMAGE, "left", "right", "last.in") == [[0, 1]] * 3


def test_a_gate_of_one_channel_ties_nothing() -> None:
    net = Net(
        lambda net, x: net.last(net.first(x) * torch.sigmoid(net.gate(net.first(x)))),
        first=conv(3, 4), gate=nn.Conv2d(4, 1, 3, padding=1), last=conv(4, 2),
    )  # fmt: skip
    assert found(net, IMAGE, "first", "gate", "gate.in") == [[0, 1, 2, 3], [-1], [0, 1, 2, 3]]


def test_channels_read_in_part_and_not_at_all() -> None:
    net = Net(lambda net, x: net.last(net.first(x)[:, 1:3]), first=conv(3, 4), last=conv(2, 2))
    assert found(net, IMAGE, "first", "last.in") == [[0, 1, 2, 3], [1, 2]]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_channels_that_are_added_up_go_one_by_one(reduce: str) -> None:
    net = Net(
        lambda net, x: net.last(getattr(net.first(x), reduce)(-1, keepdim=True).expand(-1, 3)),
        first=nn.Linear(5, 4), last=nn.Linear(3, 2),
    )  # fmt: skip
    assert found(net, VECTOR, "first") == [[0, 1, 2, 3]]


FIXED = [
    (lambda net, x: net.last(net.first(x).softmax(-1)), "computed from all channels, as by a softmax"),
    (
        lambda net, x: net.last(torch.fft.fft(net.first(x)).real),
        "computed from all channels, as by a softmax",
    ),
    (lambda net, x: net.last(torch.linalg.lu_factor(net.first(x))[0]), "no rule for linalg_lu_factor"),
    (lambda net, x: net.last(net.first(x).prod(-1, keepdim=True).expand(-1, 3)), "max over channels"),
    (lambda net, x: net.last(x[:, :3] + net.first(x)), "meets entries that cannot be removed"),
    (lambda net, x: (net.first(x), net.last(x[:, :3])), "an output of the network"),
]


@pytest.mark.parametrize(("forward", "reason"), FIXED)
def test_channels_that_cannot_go_say_why(forward: Any, reason: str) -> None:
    groups = groups_of(Net(forward, first=nn.Linear(5, 3), last=nn.Linear(3, 2)), VECTOR)
    assert groups.rows["first.weight"].tolist() == [-1] * 3
    assert any(text.endswith(reason) for text in groups.labels.reasons.values())


def test_a_sum_over_channels_lets_each_go() -> None:
    net = Net(lambda net, x: net.last(net.first(x).sum(1, keepdim=True)), first=conv(3, 4), last=conv(1, 2))
    assert found(net, IMAGE, "first", "last.in") == [[0, 1, 2, 3], [-1]]


def test_embeddings_go_with_what_is_added_to_them_and_inputs_hold_it() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.table(x) if x.dtype == torch.int64 else x
        return net.last(y + net.two(net.one(y).relu()))

    layers = {"one": nn.Linear(4, 3), "two": nn.Linear(3, 4), "last": nn.Linear(4, 2)}
    net = Net(forward, table=nn.Embedding(7, 4), **layers)
    sides = "one", "two", "two.in", "last.in"
    assert found(net, torch.randn(2, 4), *sides) == [[0, 1, 2], [-1] * 4, [0, 1, 2], [-1] * 4]
    tokens = torch.randint(0, 7, (2, 3))
    assert found(net, tokens, *sides) == [[0, 1, 2], [3, 4, 5, 6], [0, 1, 2], [3, 4, 5, 6]]
    (table,) = groups_of(net, tokens).labels.tables
    assert table == "table.weight"


def test_a_layer_called_twice_is_one_layer() -> None:
    net = Net(
        lambda net, a, b: net.last((net.twin(a) - net.twin(b)).abs()),
        twin=nn.Linear(5, 3), last=nn.Linear(3, 2),
    )  # fmt: skip
    assert found(net, (VECTOR, VECTOR + 1), "twin", "last.in", "twin.in") == [
        [0, 1, 2], [0, 1, 2], [-1] * 5
    ]  # fmt: skip


def test_a_transposed_weight_has_rows_for_columns() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.stem(x)
        return net.last(y + F.linear(net.down(y).relu(), net.down.weight.t()))

    net = Net(forward, stem=nn.Linear(5, 4), down=nn.Linear(4, 3), last=nn.Linear(4, 2))
    expected = [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert found(net, VECTOR, "stem", "down", "down.in", "last.in") == expected


def test_tokens_and_features_are_told_apart_by_axis() -> None:
    net = Net(
        lambda net, x: net.last(net.mix(net.first(x).transpose(1, 2)).transpose(1, 2)),
        first=nn.Linear(6, 4), mix=nn.Linear(4, 4), last=nn.Linear(4, 2),
    )  # fmt: skip
    # Four tokens of four features: `mix` reads the input's tokens and writes new ones, whole in the output.
    assert found(net, torch.randn(2, 4, 6), "first", "mix", "mix.in", "last.in") == [
        [0, 1, 2, 3], [-1] * 4, [-1] * 4, [0, 1, 2, 3]
    ]  # fmt: skip


def test_an_empty_part_of_a_split_has_no_channels() -> None:
    # What compaction leaves of a split whose second part is gone altogether.
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, rest = self.one(x).split([4, 0], dim=1)
            return self.two(first) + rest.sum()

    groups = groups_of(Split(), torch.ones(2, 3))
    assert groups.rows["one.weight"].tolist() == groups.columns["two.weight"].tolist()
    assert -1 not in groups.rows["one.weight"]


@pytest.mark.parametrize("computed", [False, True])
def test_a_constant_is_cut_one_way_for_all_that_read_it(computed: bool) -> None:
    """Each reader of a parameter has its own copy of the numbers; what is computed from it once is shared."""

    def forward(net: Any, x: Any) -> Any:
        given = net.made(net.given) if computed else net.given
        return net.last(net.a(x) * given) + net.end(net.b(x) + given)

    net = Net(
        forward, a=nn.Linear(5, 4), b=nn.Linear(5, 4), made=nn.Linear(4, 4), last=nn.Linear(4, 2),
        end=nn.Linear(4, 2), given=nn.Parameter(torch.rand(4)),
    )  # fmt: skip
    rows, others = found(net, VECTOR, "a", "b")
    assert (rows == others) == computed


def test_a_constant_that_is_also_read_whole_is_not_cut() -> None:
    def forward(net: Any, x: Any) -> Any:
        given = net.made(net.given)
        return net.last(net.a(x) * given) + (x[:, :4] + given).sum(1, keepdim=True)

    net = Net(
        forward,
        a=nn.Linear(5, 4),
        made=nn.Linear(4, 4),
        last=nn.Linear(4, 2),
        given=nn.Parameter(torch.rand(4)),
    )
    assert found(net, VECTOR, "a") == [[-1] * 4]


def test_a_constant_goes_along_its_own_axes() -> None:
    """A vector is added to the channels of tokens, which have more axes."""
    net = Net(
        lambda net, x: net.last(net.a(x) + net.made(net.given)),
        a=nn.Linear(5, 4), made=nn.Linear(3, 4), last=nn.Linear(4, 2), given=nn.Parameter(torch.rand(3)),
    )  # fmt: skip
    groups = groups_of(net.eval(), torch.randn(2, 3, 5))
    made = next(op.output for op in groups.graph.ops if not op.output.live and op.output.shape == (4,))
    (factor,) = groups.labels.values[made.index]
    assert factor.axes == (0,)
    assert groups.numbers[factor.labels].tolist() == groups.rows["a.weight"].tolist()
