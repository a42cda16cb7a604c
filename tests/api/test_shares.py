"""Tell how much of a network was pruned: two numbers, one warning, and levels where there is no graph."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune


class Tagger(nn.Module):
    """Embeddings, a recurrent layer, a projection of its own and a matrix that no rule can prune."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 4, 6))
        self.memory, self.out = nn.LSTM(6, hidden, batch_first=True), nn.Parameter(torch.randn(hidden, 3))
        self.powers = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.memory(self.words(x) + self.places)[0] @ self.out
        return y @ self.powers.exp()


def pruned(model: nn.Module, sparsity: float = 0.5) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        words = torch.zeros(2, 4, dtype=torch.int64)
        result = fxprune.apply(model, "random", sparsity, example_inputs=words)
    return result, [str(one.message) for one in said]


def test_the_report_tells_two_numbers_and_names_what_is_outside() -> None:
    torch.manual_seed(0)
    result, said = pruned(Tagger(8))
    inside = 32 * 6 + 32 * 8 + 24
    report = fxprune.analyze(result)
    assert report.params == inside
    assert report.sparsity == 0.5
    assert report.outside == {"powers": 9}
    assert report.matrix_params == inside + 9
    assert report.matrix_sparsity == inside / 2 / (inside + 9)
    share = f"{inside / 2 / (inside + 9):.4%}"
    assert f"of all {inside + 9} matrix weights: sparsity {share}; on no known path: powers (9)" in str(
        report
    )
    assert json.loads(report.to_json())["outside"] == {"powers": 9}
    assert said == []


def test_more_than_a_tenth_outside_is_said_once_in_one_line() -> None:
    torch.manual_seed(0)
    _, said = pruned(Tagger(2), 0.1)
    assert len(said) == 1
    assert said[0].startswith("11% of the 79 matrix weights cannot be pruned")
    assert "powers (9)" in said[0]
    assert "fxprune.lower(graph).opaque" in said[0]
    assert "\n" not in said[0]


class OwnWeights(nn.Module):
    """Convolutions and products with parameters that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(torch.randn(6, 3, 3, 3) * 0.2)])
        self.experts = nn.Parameter(torch.randn(2, 6, 5) * 0.3)
        self.table = nn.ParameterDict({"out": nn.Parameter(torch.randn(5, 2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kernel in self.kernels:
            x = F.conv2d(x, kernel, padding=1).relu()
        x = x.flatten(2).transpose(1, 2)
        x = F.linear(x, self.experts[0].T) + torch.einsum("bnc,co->bno", x, self.experts[1])
        return torch.matmul(x.mean(1), self.table["out"])


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_own_parameters_are_masked_train_copy_save_and_finalize(returns: Any) -> None:
    torch.manual_seed(0)
    model, x = OwnWeights(), torch.randn(3, 3, 6, 6)
    result = fxprune.apply(model, "magnitude", 0.6, example_inputs=x, returns=returns)
    masks = fxprune.masks(result)
    assert set(masks) == {"kernels.0", "experts", "table.out"}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    torch.testing.assert_close(result(x), zeroed(x))
    again = copy.deepcopy(result)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        again(x).square().mean().backward()
        optimizer.step()
    fxprune.verify(again)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).copy_(again.get_parameter(name) * mask)
            assert not bool(again.get_parameter(name)[~mask].any())
    torch.testing.assert_close(again(x), zeroed(x))
    result.load_state_dict(again.state_dict())
    torch.testing.assert_close(result(x), again(x))
    plain = fxprune.finalize(again)
    assert not fxprune.masks(plain)
    torch.testing.assert_close(plain(x), zeroed(x))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("returns", ["graph", "module"])
def test_recurrent_layers_compute_with_masked_weights(kind: Any, returns: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4, num_layers=2, bidirectional=True))
    x = torch.randn(5, 2, 3)
    result = fxprune.apply(model, "random", 0.5, example_inputs=x, returns=returns)
    masks = fxprune.masks(result)
    assert len(masks) == 8
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    torch.testing.assert_close(result(x), zeroed(x))
    torch.testing.assert_close(fxprune.finalize(result)(x), zeroed(x))
    fxprune.verify(result)


class Steered(nn.Module):
    """A forward that numbers steer, with layers, a parameter of its own and one that another module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 5) * 0.3)
        self.lent, self.memory = nn.Linear(5, 5, bias=False), nn.GRU(5, 4, batch_first=True)
        self.words, self.table = nn.Embedding(3, 6), nn.Parameter(torch.randn(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x + self.table)
        while float(x.detach().abs().max()) > 1:
            x = x / 2
        return self.memory(F.linear((x @ self.own).relu(), self.lent.weight)[:, None])[1][0]


class Around(nn.Module):
    """A steered part between layers that are captured."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.out = Steered(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.part(x))


MATRICES = {"first.weight", "own", "lent.weight", "memory.weight_ih_l0", "memory.weight_hh_l0"}
LABELLED = (torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1]))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", ["magnitude", "random", "snip", "force", "grasp", "ntk-sap"])
def test_a_model_without_a_graph_is_pruned_all_the_same(method: str) -> None:
    torch.manual_seed(0)
    model, x = Steered(), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="pruned without a graph: no paths") as said:
        result: Any = fxprune.apply(
            model, method, 0.6, example_inputs=x, returns="module", data=LABELLED, progress=False
        )
    assert len(said) == 1
    assert type(model) is Steered
    assert isinstance(result, Steered)
    masks = fxprune.masks(result)
    assert set(masks) == MATRICES
    size = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * size)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    torch.testing.assert_close(result(x), zeroed(x))
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        result(x).square().mean().backward()
        optimizer.step()
    assert not any(bool(result.get_parameter(name)[~mask].any()) for name, mask in masks.items())
    fxprune.verify(result)


@pytest.mark.filterwarnings("ignore:capture", "ignore:100% of")
def test_what_needs_a_graph_says_so() -> None:
    model, x = Steered(), torch.randn(4, 6)
    for options, text in (
        (
            {"method": "synflow", "returns": "module"},
            "'synflow' asks about paths, which need the graph",
        ),
        ({"granularity": "channel", "returns": "module"}, "channels need the graph"),
    ):
        with pytest.raises(RuntimeError, match=text):
            fxprune.apply(model, **{"method": "random", "example_inputs": x, **options})
    with pytest.warns(UserWarning, match="its parts are called model"):
        pruned = fxprune.apply(model, "random", 0.5, example_inputs=x)
    assert torch.equal(pruned(x), fxprune.finalize(pruned)(x))


@pytest.mark.slow
def test_layers_inside_of_what_stays_whole_are_pruned_by_weights() -> None:
    torch.manual_seed(0)
    model, x = Around(), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the part is kept whole
        result = fxprune.apply(model, "magnitude", 0.5, example_inputs=x)
        paths = fxprune.apply(model, "synflow", 0.5, example_inputs=x)
    masks = fxprune.masks(result)
    layers = {"part.first.weight", "part.lent.weight", "part.memory.weight_ih_l0", "part.memory.weight_hh_l0"}
    layers.add("part.own")  # a run of the part shows that it multiplies with it
    assert set(masks) == {"out.weight", *layers}
    assert set(fxprune.masks(paths)) == {"out.weight"}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    torch.testing.assert_close(result(x), zeroed(x))
    report = fxprune.analyze(result)
    assert set(report.outside) == layers
    everything = sum(mask.numel() for mask in masks.values())
    assert report.matrix_sparsity == sum(int((~m).sum()) for m in masks.values()) / everything


class ReadsWhatIsComputed(nn.Module):
    """Adds rows of a weight that a parametrization computes, which its layer never multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.places = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = self.last((y @ self.places.weight + self.places.weight[: y.shape[1]]).relu())
        return result


def test_a_computed_weight_that_code_reads_is_pruned_where_masks_reach_it() -> None:
    torch.manual_seed(0)
    model, x = ReadsWhatIsComputed().eval(), torch.randn(2, 5, 6)
    with pytest.warns(UserWarning, match="'places.weight': code reads .*returns='module' prunes it"):
        graph = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False)
    assert sorted(fxprune.masks(graph)) == ["first.weight", "last.weight"]
    assert torch.allclose(fxprune.finalize(graph)(x), graph(x))
    module = fxprune.apply(model, "magnitude", 0.5, example_inputs=x, progress=False, returns="module")
    mask = fxprune.masks(module)["places.weight"]
    assert torch.equal(module.places.weight != 0, mask)
    assert torch.allclose(fxprune.finalize(module)(x), module(x))
    with pytest.raises(ValueError, match="no channels go there: take returns='module'"):
        fxprune.apply(model, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
