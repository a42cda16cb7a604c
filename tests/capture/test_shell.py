"""Models whose own forward has no graph: the graph calls them as a whole, and all else works."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture import CaptureError, capture_own
from fxprune.capture.shell import Shell, in_shell

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Asks how many tokens an expert gets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(12, 32), nn.Linear(32, 4), nn.Linear(32, 5)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
        )

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.first(x) * scale
        shares, chosen = self.gate(h).softmax(-1).topk(2, -1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            if rows.numel() == 0:
                continue
            out = out.index_add(0, rows, expert(h[rows]) * shares[rows, places, None])
        return self.last(h + out)


@pytest.fixture
def model() -> Experts:
    torch.manual_seed(0)
    return Experts().eval()


pytestmark = pytest.mark.filterwarnings(
    "ignore:(Experts|Inside) cannot be captured",
    "ignore:capture",
    "ignore:method .wanda.. the inputs of",
    "ignore:100% of",
)


def names(model: nn.Module, prefix: str = "") -> set[str]:
    return {f"{prefix}{name}" for name, parameter in model.named_parameters() if parameter.dim() > 1}


def test_the_graph_calls_the_model_as_a_whole(model: Experts) -> None:
    with pytest.raises(CaptureError, match="cannot be captured: a comparison of lengths"):
        capture_own(model, X)
    with pytest.warns(UserWarning, match=r"a comparison of lengths .*; the graph calls it as a whole"):
        gm = fxprune.capture(model, X)
    assert type(gm).__name__ == "Experts"
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["model"]
    for twin in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(twin(X), model(X))
        assert torch.equal(twin(x=X[:3]), model(X[:3]))
    assert list(gm.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    assert gm.training is model.training is False


def test_arguments_are_given_in_one_order() -> None:
    shell = in_shell(Experts().eval())
    nodes = [
        [(node.target, node.args, node.kwargs) for node in capture_own(shell, given).graph.nodes][-2:]
        for given in ((X,), {"x": X})
    ]
    assert str(nodes[0]) == str(nodes[1])
    assert isinstance(shell, Shell)


@pytest.mark.parametrize("returns", ["graph", "module", "inplace"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {}),
        ("synflow", {}),
        ("wanda", {"data": [X]}),
        ("magnitude", {"granularity": "channel"}),
    ],
)
def test_it_is_pruned_compacted_and_saved(
    model: Experts, tmp_path: Path, returns: str, method: str, options: dict[str, Any]
) -> None:
    pruned = fxprune.apply(
        model, method, 0.4, example_inputs=X, returns=returns, exclude="first", progress=False, **options
    )
    assert (pruned is model) is (returns == "inplace")
    assert type(pruned).__name__ == "Experts"
    prefix = "model." if returns == "graph" else ""
    assert fxprune.masks(pruned).keys() <= names(Experts(), prefix) - {f"{prefix}first.weight"}
    report = fxprune.analyze(pruned, example_inputs=X)
    assert 0.25 < report.sparsity < 0.4
    small, final = fxprune.compact(pruned, X), fxprune.finalize(pruned)
    torch.testing.assert_close(small.eval()(X), final.eval()(X))
    if options.get("granularity") == "channel":
        assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in final.parameters())
    for number, (network, form) in enumerate(((small, "dense"), (pruned, "sparse"))):
        fxprune.save(network, tmp_path / str(number), form=form)
        assert torch.equal(fxprune.load(tmp_path / str(number), Experts()).eval()(X), network.eval()(X))


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_its_ticket_is_loaded(model: Experts, tmp_path: Path, returns: str) -> None:
    pruned = fxprune.apply(model, "magnitude", 0.4, example_inputs=X, returns=returns, progress=False)
    fxprune.save(pruned, tmp_path / "ticket", form="ticket")
    again = fxprune.load_ticket(tmp_path / "ticket", Experts(), example_inputs=X)
    masks = {name.removeprefix("model."): mask for name, mask in fxprune.masks(pruned).items()}
    for name, mask in fxprune.masks(again).items():
        assert torch.equal(mask, masks.pop(name.removeprefix("model.")))
    assert not masks


class Inside(nn.Module):
    """All of its parts are called ``model.…`` already."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return y if len(torch.nonzero(y > 100)) == 0 else y * 0.5


def test_a_model_with_a_part_called_model_is_loaded(tmp_path: Path) -> None:
    gm = fxprune.capture(Inside().eval(), X)
    assert "model.model.0.weight" in gm.state_dict()
    pruned = fxprune.apply(Inside(), "magnitude", 0.5, example_inputs=X, progress=False)
    fxprune.save(pruned, tmp_path / "file", form="sparse")
    assert torch.equal(fxprune.load(tmp_path / "file", Inside()).eval()(X), pruned.eval()(X))


def test_names_of_layers_are_those_of_the_model(model: Experts) -> None:
    pruned = fxprune.apply(
        model, "magnitude", budget={"experts.*": 0.5, "*": 0.0}, example_inputs=X, progress=False
    )
    found = {name: float(mask.double().mean()) for name, mask in fxprune.masks(pruned).items()}
    assert {round(share, 2) for name, share in found.items() if ".experts." in name} == {0.5}
    assert {share for name, share in found.items() if ".experts." not in name} <= {1.0}
    groups = fxprune.channel_groups(model, example_inputs=X, exclude="experts.0")
    assert "model.experts.0.0.weight is excluded" in {group.reason for group in groups}
    plan = fxprune.plan(model, "magnitude", 0.4, of="macs", example_inputs=X)
    assert fxprune.masks(fxprune.apply(model, plan, example_inputs=X, progress=False))


def test_a_pruner_takes_it(model: Experts) -> None:
    for returns in ("graph", "module"):
        pruner = fxprune.Pruner(
            copy.deepcopy(model), "gmp", 0.4, criterion="magnitude", total=2, example_inputs=X,
            granularity="channel", of="macs", returns=returns,
        )  # fmt: skip
        for epoch in range(2):
            pruner.step(epoch)
        before = pruner.model.eval()(X)
        small = pruner.compact()
        torch.testing.assert_close(small.eval()(X), before)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    pruner = fxprune.Pruner(
        model, "gmp", 0.4, criterion="magnitude", total=2, example_inputs=X, returns="module"
    )
    pruner.step(0)
    with pytest.raises(ValueError, match="its own forward has no graph"):
        pruner.compact()


def test_it_is_fitted_to_the_dense_model(model: Experts) -> None:
    data = [torch.randn(512, 12, generator=torch.Generator().manual_seed(1))]
    pruned = fxprune.apply(model, "magnitude", 0.6, example_inputs=X, progress=False)
    fitted = fxprune.reconstruct(pruned, data, model, progress=False)
    wanted = model(data[0])
    with torch.no_grad():
        errors = [float((one.eval()(data[0]) - wanted).square().mean()) for one in (pruned, fitted)]
    assert errors[1] < errors[0]
    assert fxprune.masks(fitted).keys() == fxprune.masks(pruned).keys()


class Hopeless(nn.Module):
    """Looks at its data, and at what random numbers of Python say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(x.detach().numpy().mean() > 0)


def test_what_no_path_leads_through_is_refused_where_paths_are_asked_for() -> None:
    model = Hopeless()
    with pytest.raises(CaptureError, match="asks about paths"):
        fxprune.apply(model, "synflow", 0.5, example_inputs=X, returns="module", progress=False)
    with pytest.warns(UserWarning, match="the graph calls it as a whole"):
        pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=X, progress=False)
    assert set(fxprune.masks(pruned)) == {"model.layer.weight"}
