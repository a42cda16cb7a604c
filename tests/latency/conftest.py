"""Invented times of layers and networks, in place of a clock."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.latency.layers import Layer, Widths
from fxprune.latency.results import Timing
from latency.networks import time_of


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Layer]:
    """No clock is read: layers have invented times, whole networks take 100 ms and half of them 50."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timed: list[Layer] = []

    def fake(layer: Layer, device: torch.device, session: Any) -> Widths:
        timed.append(layer)
        outputs = tuple(sorted({1, layer.outputs}))
        inputs = (layer.inputs,) if layer.is_depthwise else tuple(sorted({1, layer.inputs}))
        times = tuple(tuple(time_of(layer, o, i) for i in inputs) for o in outputs)
        return Widths(outputs, inputs, times)

    monkeypatch.setattr("fxprune.latency.cost.time_layer", fake)
    monkeypatch.setattr(
        "fxprune.latency.cost.time_whole",
        lambda layer, device, session: time_of(layer, layer.outputs, layer.inputs),
    )
    monkeypatch.setattr(
        "fxprune.latency.cost.measure",
        lambda models, **options: [
            Timing(name, "eager", 2, [time]) for name, time in zip(models, (100.0, 50.0), strict=False)
        ],
    )
    return timed
