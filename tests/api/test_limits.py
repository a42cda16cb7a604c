"""Targets that say what may stay: multiply-adds, parameters, weights, bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.cli import run

X = torch.ones(1, 3, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip


def prune(**options: Any) -> nn.Module:
    return fxprune.apply(
        net(), "magnitude", granularity="channel", example_inputs=X, progress=False, **options
    )


def macs(model: nn.Module) -> int:
    """Counted as the network runs, by hooks."""
    found = []

    def note(layer: Any, args: tuple[Tensor], out: Tensor) -> None:
        found.append(layer.weight.numel() * (out.shape[2:].numel() if out.dim() > 2 else 1))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    model(X)
    return sum(found)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("limit", [60_000, 120_000.0])
def test_multiply_adds(limit: float) -> None:
    pruned = prune(of="macs", at_most=limit)
    # The dearest group: a channel between the two convolutions.
    assert limit - 64 * 9 * (3 + 24) < macs(fxprune.compact(pruned)) <= limit
    assert not fxprune.analyze(pruned).asked  # which would call 0.9 the default that was taken


def test_parameters_and_weights() -> None:
    assert 2000 - 300 < parameters(fxprune.compact(prune(of="params", at_most=2000))) <= 2000
    weights = sum(int(mask.sum()) for mask in fxprune.masks(prune(at_most=1500)).values())
    assert 1500 - 300 < weights <= 1500


def test_more_than_there_is_leaves_all() -> None:
    for options in ({"of": "macs", "at_most": 1e12}, {"at_most": float("inf")}):
        with pytest.warns(
            UserWarning, match=r"at_most=(1e\+12|inf): the network takes \d+ (MACs|weights) as it is"
        ):
            pruned = prune(**options)
        assert all(bool(mask.all()) for mask in fxprune.masks(pruned).values())


def test_a_limit_out_of_reach_names_the_lowest_in_its_own_unit() -> None:
    with pytest.raises(ValueError, match=r"1 MACs are to be kept.*; ask for at_most=\d+ or more$") as caught:
        prune(of="macs", at_most=1)
    least = int(str(caught.value).rpartition("at_most=")[2].split()[0])
    assert macs(fxprune.compact(prune(of="macs", at_most=least))) <= least
    with pytest.raises(ValueError, match=r"or round_to=100, .*; no channel can go under round_to=100$"):
        prune(of="macs", sparsity=0.5, round_to=100)


def test_a_plan_has_the_limit_too() -> None:
    plan = fxprune.plan(net(), of="macs", at_most=120_000, example_inputs=X, progress=False)
    assert plan.cost[1] <= 120_000
    assert plan.sparsity == pytest.approx(1 - 120_000 / plan.cost[0])
    by_plan = fxprune.masks(fxprune.apply(net(), plan, example_inputs=X, progress=False))
    direct = fxprune.masks(prune(of="macs", at_most=120_000))
    assert all(torch.equal(by_plan[name], mask) for name, mask in direct.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_most": 0}, "at_most=0: expected a number of weights, above 0"),
        ({"at_most": "10ms", "of": "latency"}, "at_most='10ms': expected a number of ms, above 0"),
        ({"at_most": 1e5, "of": "macs", "sparsity": 0.5}, r"at_most: .* sparsity=0.5 too; give one"),
        ({"at_most": 1e5, "of": "macs", "budget": "erk"}, r"at_most: .* budget='erk' too; give one"),
        ({"at_most": 10, "of": "macs"}, r"10 MACs are to be kept, but at least [\d.e+]+ must stay"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(**options)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.ones(2, 8)\n"
    )
    source = f"{tmp_path / 'small.py'}:net"
    flags = ["-m", "magnitude", "--of", "macs", "--at-most", "100"]
    assert run(["plan", source, *flags]) == 0
    assert "192 -> 96 MACs" in capsys.readouterr().out
    assert run(["prune", source, "--granularity", "channel", *flags]) == 0
    assert run(["prune", source, "--granularity", "channel", "-s", "0.5", *flags]) == 2
    assert "give one" in capsys.readouterr().err
