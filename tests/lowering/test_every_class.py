"""The smallest model of every class of timm: captured, lowered, nothing opaque, every layer found."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from oracle import prunable

from fxprune.capture import capture
from fxprune.lowering import lower

NAMES = json.loads((Path(__file__).parent.parent / "representatives.json").read_text())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_nothing_is_opaque(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # modules kept whole are looked into all the same
        graph = lower(capture(model))
    assert not [(op.layer, op.reason) for op in graph.opaque]
    assert set(graph.kernels) == set(prunable(model))
