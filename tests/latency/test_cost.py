"""The time of a network without some of its channels, from invented times of its layers."""

import json
from pathlib import Path

import pytest
import torch

from fxprune.latency.cost import Latency, latency_cost
from fxprune.latency.layers import Layer
from fxprune.latency.table import machine
from latency.networks import CPU, groups_of, net, time_of


def test_times_are_those_of_the_widths_that_are_left(invented: list[Layer]) -> None:
    gm, groups = groups_of(net())
    cost = latency_cost(gm, groups, "eager", 1)
    staying = torch.ones(groups.count, dtype=torch.bool)
    staying[:3] = False  # three channels of the first and the depthwise convolution
    staying[8:12] = False  # four of the third
    conv, rank = Layer((2, 6, 6), 3, 8, (3, 3)), Layer((2,), 64, 5)
    expected = (
        time_of(conv, 5, 3)
        + time_of(Layer((2, 6, 6), 8, 8, (3, 3), groups=8), 5, 5)
        + time_of(conv, 12, 5)
        + time_of(rank, 5, 12 * 4)
    )
    rest = cost.fixed + cost.per_byte * cost.activations.left(staying)
    assert cost.scale == 1
    assert cost.left(staying) == pytest.approx(expected + rest)
    assert cost.whole == pytest.approx(100.0)
    # The batch is that of the example inputs: two samples.
    assert {layer.sizes[0] for layer in invented} == {2}


def test_slopes_are_what_one_group_saves(invented: list[Layer]) -> None:
    gm, groups = groups_of(net())
    cost = latency_cost(gm, groups, "eager", 1)
    bare = Latency(groups.count, cost.layers, cost.activations)
    staying = torch.ones(groups.count, dtype=torch.bool)
    saved = bare.towards(staying, 0.0)
    for group in (8, 20):  # of the third convolution: its own row, and four columns of the linear layer
        fewer = staying.clone()
        fewer[group] = False
        assert saved[group] == pytest.approx(bare.left(staying) - bare.left(fewer))


@pytest.mark.parametrize(("factor", "times"), [(10.0, 4), (1.1, 0), (0.1, 0)])
def test_times_of_a_busy_hour_are_measured_anew(
    invented: list[Layer], tmp_path: Path, factor: float, times: int
) -> None:
    """Times on disk are so many times those of now; shorter ones are those of a quieter hour, and stay."""
    gm, groups = groups_of(net())
    whole = latency_cost(gm, groups, "eager", 1).whole
    (file,) = (tmp_path / "fxprune" / "latency").glob("*.json")
    known = json.loads(file.read_text())
    for layer in known["layers"].values():
        layer["times"] = [[factor * time for time in row] for row in layer["times"]]
    file.write_text(json.dumps(known))
    invented.clear()
    cost = latency_cost(gm, groups, "eager", 1)
    assert len(invented) == times
    assert cost.whole == pytest.approx(whole)
    first = json.loads(file.read_text())["layers"][invented[0].key()] if times else None
    assert first is None or first["times"][-1][-1] == pytest.approx(
        time_of(invented[0], invented[0].outputs, invented[0].inputs)
    )


def test_a_network_measured_in_a_busy_hour_is_measured_anew(invented: list[Layer], tmp_path: Path) -> None:
    gm, groups = groups_of(net())
    latency_cost(gm, groups, "eager", 1)
    (file,) = (tmp_path / "fxprune" / "latency").glob("*.json")
    for factor, expected in ((10, 100.0), (1.1, 110.0)):
        known = json.loads(file.read_text())
        for pair in known["networks"].values():
            for numbers in pair:
                numbers[2] *= factor
        file.write_text(json.dumps(known))
        assert latency_cost(gm, groups, "eager", 1).whole == pytest.approx(expected)


def test_every_layer_is_timed_once_and_kept_on_disk(invented: list[Layer], tmp_path: Path) -> None:
    gm, groups = groups_of(net())
    latency_cost(gm, groups, "eager", 1)
    assert len(invented) == len(set(invented)) == 4
    latency_cost(gm, groups, "eager", 1)
    assert len(invented) == 4
    (file,) = (tmp_path / "fxprune" / "latency").glob("*.json")
    known = json.loads(file.read_text())
    assert known["machine"] == machine(CPU, "eager", 1)
    assert len(known["layers"]) == 4
