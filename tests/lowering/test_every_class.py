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
# All of them take minutes; these are quick, and of every kind: convolutions, attention, mixers, state spaces.
QUICK = {
    "edgenext_xx_small", "efficientvim_m1", "gmlp_ti16_224", "legacy_seresnet18",
    "pit_ti_224", "poolformerv2_s12",
}  # fmt: skip


def test_the_quick_ones_are_among_them() -> None:
    assert QUICK <= set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(NAMES)]
)
def test_nothing_is_opaque(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # modules kept whole are looked into all the same
        graph = lower(capture(model))
    assert not [(op.layer, op.reason) for op in graph.opaque]
    assert set(graph.kernels) >= set(prunable(model))
