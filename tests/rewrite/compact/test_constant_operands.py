"""Constants that code makes by itself: picked by entry where channels go, or the channels stay."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from rewrite.compact.masked import assert_compacts, redrawn

X = torch.linspace(-1, 1, 24).view(4, 6)
Function = Callable[[Tensor], Tensor]

PICKED: dict[str, Function] = {
    "a table of literal size": lambda y: y * torch.linspace(0.5, 1, 12),
    "a table of the value's size": lambda y: y + torch.arange(y.shape[1]),
    "a table over rows": lambda y: y * torch.arange(48.0).view(4, 12),
    "a table and a scalar": lambda y: y * nn.functional.normalize(torch.arange(12.0), dim=0) + 1,
    "a constant in float32": lambda y: (y * torch.full((12,), 2.0, dtype=torch.float32)) / 3,
}
HELD: dict[str, Function] = {
    "numbers that follow from places": lambda y: y + torch.ones_like(y).cumsum(1),
    "a share of each": lambda y: y * torch.ones_like(y).softmax(1),
    "a count of them": lambda y: y * torch.ones_like(y).sum(1, keepdim=True),
}


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 12), nn.Linear(12, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def compacted(function: Function) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    pruned = fxprune.apply(
        Net(function).eval(), "magnitude", 0.5, example_inputs=X, granularity="channel", progress=False
    )
    return pruned, fxprune.compact(pruned)


@pytest.mark.parametrize("name", PICKED)
def test_entries_of_constants_go_with_their_channels(name: str, tmp_path: Path) -> None:
    pruned, small = compacted(PICKED[name])
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert small.get_submodule("a").weight.shape == (6, 6)
    assert torch.allclose(small(X), pruned(X), atol=1e-5)
    fxprune.save(small, tmp_path / "small.safetensors")
    again = fxprune.load(tmp_path / "small.safetensors", Net(PICKED[name]).eval())
    assert torch.equal(again(X), small(X))


@pytest.mark.parametrize("name", HELD)
def test_channels_that_a_constant_counts_stay(name: str) -> None:
    pruned, small = compacted(HELD[name])
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 6
    assert "it would compute something else" in str(table)
    assert torch.allclose(small(X), pruned(X), atol=1e-5)


class Single(nn.Module):
    """A product that PyTorch refuses in mixed types: its other factor is made in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x * 1e6) @ torch.eye(12, dtype=torch.float32)) - 1e6


def test_outputs_are_compared_in_float64_also_where_code_makes_float32() -> None:
    torch.manual_seed(0)
    model = Single().eval()
    with torch.no_grad():
        model.b.weight[:, :5], model.a.bias[:5] = 0, 1e6
    small = fxprune.compact(model, X)
    assert small.meta["fxprune"]["compaction"].difference < 1e-5


class Halves(nn.Module):
    """Every second channel meets its neighbour; a convolution in groups is called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.kernel = (
            nn.Conv2d(4, 16, 1),
            nn.Conv2d(4, 5, 1),
            nn.Parameter(torch.randn(8, 4, 3, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(self.a(x).relu(), self.kernel, None, 1, 1, 1, 4)
        return self.b(y[:, ::2] + y[:, 1::2]).mean((2, 3))


def test_slices_with_steps_and_groups_of_functions_are_rewritten(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(2, 4, 6, 6)
    pruned = fxprune.apply(model, "magnitude", 0.6, example_inputs=x, granularity="channel", progress=False)
    small = fxprune.compact(pruned)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert torch.allclose(small(x), pruned(x), atol=1e-5)
    fxprune.save(small, tmp_path / "small.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "small.safetensors", Halves().eval())(x), small(x))


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.norm = nn.Embedding(11, 12), nn.Linear(12, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.a(self.table(x))), self.table.weight)


def test_the_rows_of_a_table_that_is_a_layer_too_stay_and_its_columns_go() -> None:
    model, x = redrawn(TiedHead()), torch.randint(0, 11, (2, 5))
    small = assert_compacts(model, x, 0.5)
    table = small.get_parameter("table.weight")
    assert table.shape[0] == 11
    assert table.shape[1] < 12
    reasons = {group.reason for group in fxprune.channel_groups(model, x) if group.reason}
    assert any("a table is read whole" in reason for reason in reasons)


class Loop(nn.Module):
    """Iterates a layer from zeros, to a fixed point."""

    def __init__(self, start: Callable[[Tensor], Tensor], image: bool) -> None:
        super().__init__()
        layer = (lambda n, m: nn.Conv2d(n, m, 3, padding=1)) if image else nn.Linear
        self.around, self.into, self.last = layer(16, 16), layer(6, 16), layer(16, 3)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        state, given = self.start(x), self.into(x)
        for _ in range(3):
            state = torch.tanh(self.around(state) + given)
        return self.last(state)


@pytest.mark.parametrize(
    ("start", "image"),
    [
        (lambda x: torch.zeros(x.shape[0], 16), False),
        (lambda x: x.new_zeros((4, 16)), False),
        (lambda x: torch.zeros(x.shape[0], 16, *x.shape[2:]), True),
    ],
)
def test_the_first_state_of_a_loop_goes_with_its_channels(
    start: Callable[[Tensor], Tensor], image: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5) if image else torch.randn(4, 6)
    model = Loop(start, image).eval()
    pruned = fxprune.apply(model, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned)
    assert not small.meta["fxprune"]["compaction"].given_back
    assert small.get_parameter("around.weight").shape[1] < 16
    torch.testing.assert_close(small(x), fxprune.finalize(pruned)(x))
