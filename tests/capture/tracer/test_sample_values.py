"""Modules that shapes do not suffice for are run on made-up numbers, and stay whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture

ROWS = ([torch.ones(3, 8), torch.full((2, 8), -1.0)],)


class Nested(nn.Module):
    """Rows of several lengths, as nested tensors hold them."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.one, self.two, self.layout = nn.Linear(8, 8), nn.Linear(8, 4), layout

    def forward(self, images: list[Tensor]) -> Tensor:
        rows = [self.one(image) for image in images]
        nested = torch.nested.as_nested_tensor(rows, layout=self.layout)
        return self.two(torch.nested.to_padded_tensor(nested, 0.0).sum(1))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.head(self.inner(images).relu())


@pytest.fixture(autouse=True)
def _no_word_on_prototypes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        yield


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_module_that_nests_tensors_stays_whole(layout: torch.layout) -> None:
    model = Around(Nested(layout)).eval()
    wanted = model(*ROWS)
    with pytest.warns(UserWarning, match=r"inner \(Nested\) kept whole"):
        gm = capture(model, ROWS)
    assert torch.equal(gm(*ROWS), wanted)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["inner", "head"]
    with pytest.warns(UserWarning, match="kept whole"):
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=ROWS, progress=False)
    assert set(fxprune.masks(pruned)) == {"inner.one.weight", "inner.two.weight", "head.weight"}


def test_a_model_that_runs_on_numbers_alone_is_pruned_without_a_graph() -> None:
    model = Nested(torch.jagged)
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="a nested tensor has rows of several lengths"):
        graph = fxprune.apply(model, "magnitude", 0.5, example_inputs=ROWS, progress=False)
    assert set(fxprune.masks(graph)) == {"model.one.weight", "model.two.weight"}
    assert torch.equal(graph(*ROWS), fxprune.finalize(graph)(*ROWS))
    with pytest.warns(UserWarning, match="pruned without a graph"):
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=ROWS, returns="module", progress=False)
    assert set(fxprune.masks(pruned)) == {"one.weight", "two.weight"}
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="does not accept"):
        capture(model, ([torch.ones(3, 9)],))


class ByNumPy(nn.Module):
    """Code of another library, which knows no shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().storage_offset()) + 1.0
        buffer = bytes(x.detach().untyped_storage())[:1]
        return self.one(x) * scale * len(buffer)


def test_a_module_that_reads_memory_stays_whole() -> None:
    model = Around(ByNumPy()).eval()
    x = torch.ones(2, 8)
    wanted = model(x)
    with pytest.warns(UserWarning, match="kept whole"):
        gm = capture(model, (x,))
    assert torch.equal(gm(x), wanted)


class Halved(nn.Module):
    """Cuts at a number that PyTorch's older constructor holds, and at one in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.register_buffer("places", torch.tensor([4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.IntTensor([4])
        first, second = self.one(x).split([places[0].item(), self.places[0].item()], 1)
        return first * second.sigmoid() * float(x.detach().numpy().any())


def test_whole_numbers_that_code_knows_are_those_of_a_made_up_run() -> None:
    model, x = Around(Halved()).eval(), torch.ones(2, 8)
    with pytest.warns(UserWarning, match="kept whole"):
        gm = capture(model, (x,))
    assert torch.equal(gm(x), model(x))


class Counts(nn.Module):
    """Counts its calls in training, in a buffer, and looks at its data."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)
        self.register_buffer("calls", torch.tensor([7]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.one(x) * float(x.detach().numpy().any())


def test_a_made_up_run_counts_nothing() -> None:
    model = Around(Counts())
    with pytest.warns(UserWarning, match="kept whole"):
        capture(model, (torch.ones(2, 8),))
    assert int(model.inner.calls) == 7
