"""A plan before the cut: it changes nothing, says what would go, and does it when applied."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS
from torch import nn

import fxprune
from fxprune.cli import run

X = torch.ones(2, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def make(model: nn.Module, method: str = "magnitude", sparsity: float = 0.5, **options: Any) -> fxprune.Plan:
    options.setdefault("example_inputs", X)
    return fxprune.plan(model, method, sparsity, progress=False, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = fxprune.masks(a), fxprune.masks(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


DATA = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3]))


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {"of": "macs"}),
        ("synflow", {"of": "params", "rounds": 5}),
        ("random", {"of": "memory", "seed": 3}),
        ("taylor", {"of": "macs", "data": DATA, "scope": "isomorphic"}),
        ("magnitude", {"exclude": "3", "round_to": 2, "sparsity": 0.2}),
    ],
)
def test_a_plan_does_what_apply_does(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    sparsity = options.pop("sparsity", 0.4)
    model = net()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = make(model, method, sparsity, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not fxprune.masks(model)
    applied = fxprune.apply(
        model, method, sparsity, granularity="channel", example_inputs=X, progress=False, **options
    )
    assert same(fxprune.apply(model, plan, example_inputs=X, progress=False), applied)
    plan.save(tmp_path / "plan.json")
    again = fxprune.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert same(fxprune.apply(model, again, example_inputs=X, returns="module", progress=False), applied)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "multi_head" if "multi_head" in NETS else "encoder"])
def test_whole_heads(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[kind]()
    plan = make(model, sparsity=0.3, granularity="head", example_inputs=inputs)
    applied = fxprune.apply(
        model, "magnitude", 0.3, granularity="head", example_inputs=inputs, progress=False
    )
    assert same(fxprune.apply(model, plan, example_inputs=inputs, progress=False), applied)


def test_the_table_is_that_of_the_compact_network() -> None:
    model = net()
    plan = make(model, of="macs")
    table = fxprune.compact(fxprune.apply(model, plan, example_inputs=X, progress=False), X)
    found = table.meta["fxprune"]["compaction"]
    for layer, compacted in zip(plan.layers, found.layers, strict=True):
        assert layer.name == compacted.name
        assert (layer.outputs, layer.inputs) == (compacted.outputs, compacted.inputs)
        assert (layer.weights, layer.macs) == (compacted.weights, compacted.macs)
    assert plan.macs == found.macs == plan.cost
    assert plan.parameters == found.parameters
    assert sum(layer.share for layer in plan.layers) == pytest.approx(1)
    text = str(plan)
    assert f"12 -> {found.layers[1].outputs[1]}" in text
    assert text.splitlines()[-1] == "nothing is changed yet: fxprune.apply(model, plan) removes it"


def test_the_curve_has_ten_targets_from_one_scoring() -> None:
    calls = 0
    magnitude = fxprune.methods.get("magnitude")

    def find(problem: Any) -> Any:
        nonlocal calls
        calls += 1
        return magnitude.find(problem)

    model = net()
    plan = make(model, fxprune.Method("counted", find), of="macs")  # type: ignore[arg-type]
    assert calls == 1
    assert len(plan.curve) == 10
    for low, high in zip(plan.curve, plan.curve[1:], strict=False):
        assert low.sparsity < high.sparsity
        assert low.cost >= high.cost
        assert low.kept_score >= high.kept_score
    assert all(point.cost <= (1 - point.sparsity) * plan.cost[0] * (1 + 1e-9) for point in plan.curve)
    # Each point is what apply leaves at that target.
    point = plan.curve[4]
    pruned = fxprune.apply(
        model, "magnitude", point.sparsity, granularity="channel", of="macs", example_inputs=X, progress=False
    )
    assert fxprune.compact(pruned).meta["fxprune"]["compaction"].macs[1] == point.cost


@pytest.mark.slow
def test_the_curve_is_chosen_as_the_method_chooses() -> None:
    """Group norms add up squares, relative to their family; the curve does too."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)),
        None,
    )
    x = torch.randn(2, 6)
    with torch.no_grad():
        model[2].weight.mul_(100)
    whole = fxprune.plan(model, "group-norm", 0.2, of="macs", example_inputs=x, progress=False)
    for point in whole.curve[:5]:
        own = fxprune.plan(model, "group-norm", point.sparsity, of="macs", example_inputs=x, progress=False)
        assert own.cost[1] == point.cost


@pytest.mark.slow
def test_the_curve_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    plan = make(net(), of="macs")
    axes = plan.plot().axes[0]
    assert axes.get_xlabel() == "MACs left (%)"
    assert list(axes.lines[0].get_xdata()) == [100 * point.cost / plan.cost[0] for point in plan.curve]
    with pytest.raises(ValueError, match="gives no scores"):
        fxprune.Plan("a", 0.5, "macs", (1, 1), (1, 1), (1, 1), ()).plot()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = net()
    plan = make(model)
    with pytest.raises(ValueError, match="granularity='weight': a plan is of channels"):
        make(model, granularity="weight")
    wider = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 64, 4))
    with pytest.raises(ValueError, match=r"another network: '0\.weight' has 8 outputs in the plan, 9 in"):
        fxprune.apply(wider, plan, example_inputs=X)
    with pytest.raises(ValueError, match="a plan has its sparsity, budget, granularity"):
        fxprune.apply(model, plan, example_inputs=X, granularity="channel")
    object.__setattr__(plan.layers[-1], "removed", "0")
    with pytest.raises(ValueError, match="channels that cannot go"):
        fxprune.apply(model, plan, example_inputs=X)
    object.__setattr__(plan.layers[-1], "removed", "0 90-92")
    with pytest.raises(
        ValueError, match=r"plan: removed='0 90-92' of '.*', whose channels are numbered from 0 to"
    ):
        fxprune.apply(model, plan, example_inputs=X)
    for removed in ("0-b", 3):
        object.__setattr__(plan.layers[-1], "removed", removed)
        with pytest.raises(
            ValueError, match=f"plan: removed={removed!r} of '.*': expected numbers and ranges"
        ):
            fxprune.apply(model, plan, example_inputs=X)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="no plan of version 1"):
        fxprune.Plan.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="it is not JSON"):
        fxprune.Plan.load(tmp_path / "a.json")


FILE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.ones(2, 8)
"""


@pytest.mark.parametrize(
    "more", [{"sparsity": 0.3}, {"data": DATA}, {"loss_fn": nn.MSELoss()}, {"seed": 1}, {"of": "macs"}]
)
def test_a_plan_takes_nothing_that_it_would_ignore(more: dict[str, Any]) -> None:
    plan = make(net())
    with pytest.raises(ValueError, match="a plan has its sparsity, budget"):
        fxprune.apply(net(), plan, example_inputs=X, **more)


def test_a_method_that_changes_weights_makes_no_plan() -> None:
    with pytest.raises(ValueError, match=r"'sparsegpt'.*changes the weights"):
        make(net(), "sparsegpt", data=DATA)


@pytest.mark.parametrize("damage", ["no costs", "odd layer", "odd curve"])
def test_a_damaged_plan_is_an_error_that_says_so(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = json.loads(make(net()).to_json())
    if damage == "no costs":
        del found["cost"]
    elif damage == "odd layer":
        found["layers"][0] = 3
    else:
        found["curve"] = [{"at": 1}]
    path.write_text(json.dumps(found))
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.json': no such plan; make one with"):
        fxprune.Plan.load("nowhere.json")
    with pytest.raises(ValueError, match=r"plan\.json.*damaged plan"):
        fxprune.Plan.load(path)


@pytest.mark.slow
def test_the_command_line_plans_and_prunes_by_the_plan(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "small.py").write_text(FILE)
    source, out = f"{tmp_path / 'small.py'}:net", tmp_path / "plan.json"
    assert run(["plan", source, "-m", "magnitude", "-s", "0.5", "--of", "macs", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "magnitude to 0.5 of macs: 192 -> 96 MACs (50.0% left)" in text
    assert fxprune.Plan.load(out).layers[0].outputs == (16, 8)
    assert run(["prune", source, "--plan", str(out), "--compact", "--json"]) == 0
    assert '"method": "magnitude"' in capsys.readouterr().out
    for flag, value in (("--granularity", "channel"), ("--sparsity", "0.3"), ("--data", "digits")):
        assert run(["prune", source, "--plan", str(out), flag, value]) == 2
        assert f"what {flag} would" in capsys.readouterr().err
    assert run(["prune", source, "--plan", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
