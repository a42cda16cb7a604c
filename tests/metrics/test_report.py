"""The report, against numbers computed by hand, by the oracle and by integers."""

import json
import math
import random
import warnings
from typing import Any

import oracle
import pytest
import timm
import torch
from nets import NETS
from torch import nn

import fxprune


def layered(*masks: list[list[int]]) -> Any:
    """A chain of linear layers under masks, captured."""
    tensors = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
    net = nn.Sequential(*[nn.Linear(mask.shape[1], mask.shape[0], bias=False) for mask in tensors])
    gm = fxprune.capture(net, torch.ones(1, tensors[0].shape[1]))
    fxprune.set_masks(gm, {f"{i}.weight": mask for i, mask in enumerate(tensors)})
    return gm


# Inputs 0 and 1 reach unit 0; unit 1 gets input 1 and leads nowhere; unit 2 is fed by nothing.
CHAIN = layered([[1, 1], [0, 1], [0, 0]], [[1, 0, 1], [0, 0, 1]])


def test_a_chain_by_hand() -> None:
    report = fxprune.analyze(CHAIN)
    assert (report.params, report.kept_params, report.effective_params) == (12, 6, 3)
    assert (report.effective_kernels, report.effective_nodes, report.nodes) == (3, 2, 5)
    assert report.density == 0.5
    assert report.layer_density == {"0.weight": 0.5, "1.weight": 0.5}
    assert report.log_paths == pytest.approx(math.log(2))
    assert report.dead_layers == ()
    assert (report.macs, report.masked_macs) == (12, 6)
    assert report.layers["0.weight"].effective_params == 2
    assert report.layers["1.weight"].effective_nodes == 1
    masks = report.effective_param_masks()
    assert masks["0.weight"].tolist() == [[True, True], [False, False], [False, False]]
    masks["0.weight"].zero_()
    assert report.effective_param_masks()["0.weight"].any(), "the report gave its own tensors away"


def test_nothing_left() -> None:
    report = fxprune.analyze(layered([[1, 1], [1, 1]], [[0, 0]]))
    assert report.log_paths == -math.inf
    assert report.dead_layers == ("0.weight", "1.weight")
    assert json.loads(report.to_json())["log_paths"] is None
    assert "effective paths: none" in str(report)


def test_print_and_json() -> None:
    report = fxprune.analyze(CHAIN)
    text = str(report)
    assert "0.weight" in text
    assert "sparsity 50.0000%" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    found = json.loads(report.to_json())
    assert found["effective_params"] == 3
    assert found["layers"]["1.weight"]["shape"] == [2, 3]
    assert found["layers"]["0.weight"]["density"] == 0.5


@pytest.mark.parametrize("seed", range(8))
def test_random_residual_networks_against_integers(seed: int) -> None:
    rng = random.Random(seed)
    width, depth = rng.randint(2, 5), rng.randint(2, 6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x).relu()
            return x

    model = Net()
    masks = {
        f"layers.{i}.weight": torch.tensor([[rng.random() < 0.4 for _ in range(width)] for _ in range(width)])
        for i in range(depth)
    }
    counts = [1] * width
    for mask in masks.values():
        rows = [[int(kept) for kept in row] for row in mask.tolist()]
        counts = [
            own + sum(kept * count for kept, count in zip(row, counts, strict=True))
            for own, row in zip(counts, rows, strict=True)
        ]
    gm = fxprune.capture(model, torch.ones(1, width))
    fxprune.set_masks(gm, masks)
    for resolution in ("spatial", "channel"):
        report = fxprune.analyze(gm, resolution)
        assert report.log_paths == pytest.approx(math.log(sum(counts)), rel=1e-12)
        assert report.effective_params == sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("net", ["dense", "shuffle", "excite_sigmoid", "multihead", "dead_taps", "tied"])
def test_effective_weights_are_the_oracles(net: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    masks = oracle.random_masks(model, 0.4, seed=1)
    expected = oracle.effective_parameters(model.eval(), inputs, masks)
    gm = fxprune.capture(model, inputs)
    fxprune.set_masks(gm, masks)
    found = fxprune.analyze(gm).effective_param_masks()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found.keys() == expected.keys()


def test_any_model_can_be_analysed() -> None:
    torch.manual_seed(0)
    model, inputs = NETS["conv_chain"]()
    masks = oracle.random_masks(model, 0.5, seed=0)
    gm = fxprune.capture(model, inputs)
    fxprune.set_masks(gm, masks)
    expected = fxprune.analyze(gm)
    assert fxprune.analyze(gm, example_inputs=inputs) == expected, "captured anew"
    assert fxprune.masks(gm).keys() == masks.keys(), "analysed in place"
    fxprune.set_masks(model, masks)
    assert fxprune.analyze(model, example_inputs=inputs).to_json() == expected.to_json()
    channel = fxprune.analyze(gm, "channel")
    assert all(bool((mask | ~expected.effective[n]).all()) for n, mask in channel.effective.items())


def test_masks_on_other_parameters_do_not_count() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    gm = fxprune.capture(model, torch.zeros(1, 3, dtype=torch.long))
    fxprune.set_masks(gm, {"1.weight": torch.tensor([[True] * 4, [False] * 4])})
    report = fxprune.analyze(gm)
    assert list(report.layers) == ["1.weight"]
    assert report.density == 0.5


@pytest.mark.slow
def test_dense_numbers_of_a_known_network() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.device("meta"):
            model = timm.create_model("resnet50")
        report = fxprune.analyze(fxprune.capture(model), "channel")
    assert report.params == 25_502_912
    assert report.effective_params == report.params
    assert report.macs == pytest.approx(4.09e9, rel=2e-3)
    assert report.nodes == report.effective_nodes == 27_560
    assert report.dead_layers == ()
    assert report.opaque == 0


class Attention(nn.Module):
    """Attention without biases, so that a channel without weights is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.attend = nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in ("q", "k", "v", "out")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        q, k, v = (self.attend[n](y).unflatten(-1, (2, -1)).transpose(1, 2) for n in ("q", "k", "v"))
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.last(y + self.attend["out"](mixed.transpose(1, 2).flatten(2)))


def test_products_have_a_line_of_their_own_and_are_in_the_totals() -> None:
    model, x = Attention(), torch.randn(2, 5, 6)
    report = fxprune.analyze(model, example_inputs=x)
    assert list(report.products) == ["attend"]
    assert report.products["attend"].macs == report.products["attend"].masked_macs == 2 * 5 * 5 * 8
    layers = 5 * (6 * 8 * 2 + 8 * 8 * 4)
    assert report.macs == report.masked_macs == layers + 2 * 5 * 5 * 8
    found = report.to_dict()
    assert found["products"] == {"attend": {"macs": 400, "masked_macs": 400}}
    assert found["macs"] == report.macs
    assert json.loads(report.to_json()) == found
    lines = [line.split() for line in str(report).splitlines()]
    assert ["attend", "product", "400", "/", "400"] in lines


@pytest.mark.thinned(4)
@pytest.mark.parametrize("resolution", ["spatial", "channel"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_products_left_are_those_of_the_smaller_network(sparsity: float, resolution: Any) -> None:
    """Compaction removes the channels; what it leaves does what the masks leave."""
    model, x = Attention(), torch.randn(2, 5, 6)
    pruned = fxprune.apply(
        model, "magnitude", sparsity, granularity="channel", example_inputs=x, progress=False
    )
    small = fxprune.compact(pruned)
    masked = fxprune.analyze(pruned, resolution).products["attend"]
    left = fxprune.analyze(small, resolution, example_inputs=x)
    assert masked.macs == 400
    assert masked.masked_macs == sum(one.macs for one in left.products.values()) < 400


def test_numbers_stand_under_one_another() -> None:
    net = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1))
    lines = str(fxprune.analyze(net, example_inputs=torch.ones(1, 100))).splitlines()
    ends = {line.index(" 100.00%") for line in lines if " 100.00%" in line}
    assert len(ends) == 1
    assert "   10,000 " in lines[4]
    assert "      100 " in lines[5]
