"""Networks that nobody thought of: every promise, on 200 of them (5000 in ``benchmarks/fuzz.py``)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from lowering.strategies import Architecture, architectures
from lowering.whole import assert_whole

DENSITIES = st.sampled_from([1.0, 0.8, 0.6, 0.4, 0.2])
# No shrinking: what fails is small, and is printed whole.
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


def _check(architecture: Architecture, density: float, seed: int) -> None:
    model, example = architecture.build()
    note(str(model))
    assert_whole(model, example, density, seed)


@settings(max_examples=70, **SETTINGS)
@given(architectures("image"), DENSITIES, st.integers(0, 3))
def test_images(architecture: Architecture, density: float, seed: int) -> None:
    _check(architecture, density, seed)


@settings(max_examples=80, **SETTINGS)
@given(architectures("tokens"), DENSITIES, st.integers(0, 3))
def test_tokens(architecture: Architecture, density: float, seed: int) -> None:
    _check(architecture, density, seed)


@settings(max_examples=50, **SETTINGS)
@given(architectures("vector"), DENSITIES, st.integers(0, 3))
def test_vectors(architecture: Architecture, density: float, seed: int) -> None:
    _check(architecture, density, seed)


@pytest.mark.parametrize("start", ["image", "tokens", "vector"])
def test_the_repr_rebuilds_the_network(start: str) -> None:
    """What a failure prints is enough to have the network again."""
    architecture = Architecture(start, (5, 77, 1234))
    assert str(eval(repr(architecture)).build()[0]) == str(architecture.build()[0])
