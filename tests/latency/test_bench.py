"""Measurements of networks side by side: what they count, what they leave alone, what they refuse."""

import importlib.util
import json
import statistics
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.latency import Bench, Measured, Timing, runtimes
from fxprune.latency.memory import peak_bytes


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Dropout(), nn.ReLU(), nn.Linear(width, 4))


def test_numbers_are_those_of_the_networks() -> None:
    x = torch.randn(2, 6)
    dense = net()
    masked = fxprune.apply(dense, "magnitude", 0.5, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(masked)
    state, modes = torch.get_rng_state(), [module.training for module in masked.modules()]
    found = fxprune.bench(
        {"dense": dense, "masked": masked, "compact": small}, x, batch=(1, 3), seconds=0.001, threads=1
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in masked.modules()]
    width = small.get_submodule("0").out_features
    assert [n.macs for n in found.networks.values()] == [160, 160, 10 * width]
    assert [n.parameters for n in found.networks.values()] == [180, 180, 11 * width + 4]
    assert [(t.network, t.batch) for t in found.timings[:2]] == [("dense", 1), ("masked", 1)]
    assert len(found.timings) == 6
    assert all(len(t.milliseconds) >= 7 and min(t.milliseconds) > 0 for t in found.timings)
    assert found.networks["compact"].peak_bytes[1] < found.networks["dense"].peak_bytes[1]
    text = str(found)
    assert "1 thread, medians of" in text
    assert text.count("x as fast as dense") == 4
    rows = json.loads(found.to_json())
    assert rows["networks"]["dense"]["macs"] == 160
    assert rows["timings"][0]["median_ms"] == statistics.median(found.timings[0].milliseconds)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 36), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        out: torch.Tensor = self.head(nn.functional.scaled_dot_product_attention(q, k, v))
        return out


def test_products_of_attention_count_as_in_the_table_of_a_compaction() -> None:
    x = torch.randn(2, 5, 6)
    small = fxprune.compact(fxprune.apply(Attention(), "magnitude", 0.5, granularity="channel", of="macs",
                                          example_inputs=x, progress=False))  # fmt: skip
    found = fxprune.bench({"dense": Attention(), "compact": small}, x, seconds=0.001, threads=1)
    counts = [network.macs for network in found.networks.values()]
    assert counts[0] == 5 * (6 * 36 + 12 * 4) + 2 * 5 * 5 * 12
    assert counts == list(small.meta["fxprune"]["compaction"].macs)


def test_a_speed_up_is_measured_and_never_computed_from_macs() -> None:
    slow, fast = Measured(100, 1000, 400, {}), Measured(50, 10, 200, {})
    times = [Timing("a", "eager", 1, [4.0, 4.0, 4.0]), Timing("b", "eager", 1, [2.0, 8.0, 2.0])]
    text = str(Bench({"a": slow, "b": fast}, times, "cpu", 1))
    assert "2.00 x as fast as a" in text
    assert "100" not in text.split("\n\n")[1]


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1  # 4000 bytes
            y = y + 1  # 4000 more, then the first are freed
            y = y + 1
            return y[:10].clone()

    x = torch.ones(1000)
    with torch.no_grad():
        assert peak_bytes(Steps(), lambda: Steps()(x)) == 8000


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_of_their_own(runtime: str) -> None:
    for package in ("onnx", "onnxscript", runtime):
        pytest.importorskip(package)
    dense = net()
    found = fxprune.bench({"dense": dense}, torch.randn(2, 6), runtimes=[runtime], seconds=0.001, threads=1)
    assert found.timing("dense", runtime).median > 0


def test_a_runtime_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        runtimes.importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name)
    )
    monkeypatch.setattr(runtimes, "ONNX_PACKAGES", ())
    monkeypatch.setitem(runtimes._NEEDS, "openvino", ("openvino",))
    found = fxprune.bench({"a": net()}, torch.randn(2, 6), runtimes=["eager", "openvino"], seconds=0.001)
    assert {t.runtime for t in found.timings} == {"eager"}
    line = "openvino: not measured, as openvino is not installed; pip install openvino"
    assert str(found).splitlines()[-1] == line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": {}}, r"models=\{\}: expected a dict"),
        ({"batch": (0,)}, "batch: 0 is no batch size"),
        ({"runtimes": ("tpu",)}, "runtimes: 'tpu' is unknown; expected some of eager"),
        ({"threads": 0}, "threads=0: expected a number from 1"),
        ({"threads": 1.5}, r"threads=1\.5: expected a number from 1"),
        ({"seconds": "1"}, "seconds='1': expected a number above 0"),
        ({"seconds": 0}, "seconds=0: expected a number above 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    given = {"models": {"a": net()}, "example_inputs": torch.ones(1, 6), **options}
    with pytest.raises(ValueError, match=words):
        fxprune.bench(**given)
    with pytest.raises(
        TypeError, match=r"^models: got a Sequential, expected a dict of networks.*$"
    ) as caught:
        fxprune.bench(net())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"^models: got a list, expected a dict of networks by name$"):
        fxprune.bench([net()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"models\['a'\]: expected a torch\.nn\.Module, got a int"):
        fxprune.bench({"a": 3})  # type: ignore[dict-item]


def test_one_batch_size_and_one_runtime_need_no_list() -> None:
    found = fxprune.bench({"a": net()}, torch.ones(1, 6), batch=3, runtimes="eager", seconds=0.001)
    assert [(timing.runtime, timing.batch) for timing in found.timings] == [("eager", 3)]


def test_inputs_are_those_of_the_first_network_that_says_them() -> None:
    masked = fxprune.apply(net(), "magnitude", 0.5, example_inputs=torch.ones(2, 6), progress=False)
    found = fxprune.bench({"dense": net(), "masked": masked}, seconds=0.001)
    assert [timing.network for timing in found.timings] == ["dense", "masked"]
    with pytest.raises(ValueError, match="example_inputs: the input size of Sequential is not known"):
        fxprune.bench({"dense": net()}, seconds=0.001)


class Sized(nn.Sequential):
    """Says what it takes as timm does: 32 pixels a side."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )
        self.pretrained_cfg = {"input_size": (3, 32, 32)}


def test_all_networks_are_counted_at_one_size() -> None:
    small = torch.ones(2, 3, 8, 8)
    masked = fxprune.apply(Sized(), "magnitude", 0.5, example_inputs=small, progress=False)

    def macs(*inputs: torch.Tensor) -> set[int]:
        found = fxprune.bench({"dense": Sized(), "masked": masked}, *inputs, seconds=0.001, threads=1)
        return {network.macs for network in found.networks.values()}

    # Somebody chose the size that the graph has; the usual one was nobody's choice.
    assert macs() == {27 * 4 * 64 + 8}
    assert macs(torch.ones(1, 3, 16, 16)) == {27 * 4 * 256 + 8}


def test_the_argument_that_was_meant_is_named() -> None:
    with pytest.raises(TypeError, match=r"^bench has no argument 'runtime'; did you mean 'runtimes'\?$"):
        fxprune.bench({"net": net()}, torch.ones(1, 6), runtime="eager")  # type: ignore[arg-type]
