"""Networks that nobody thought of: every promise, on 60 (300 if slow; ``benchmarks/fuzz.py`` has 5000)."""

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


STARTS = ("image", "tokens", "vector")


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "count",
    [20, pytest.param(100, marks=pytest.mark.slow)],  # a hundred networks take over ten seconds
)
def test_networks(start: str, count: int) -> None:
    @settings(max_examples=count, **SETTINGS)
    @given(architectures(start), DENSITIES, st.integers(0, 3))
    def check(architecture: Architecture, density: float, seed: int) -> None:
        model, example = architecture.build()
        note(str(model))
        assert_whole(model, example, density, seed)

    check()


@pytest.mark.parametrize("start", STARTS)
def test_the_repr_rebuilds_the_network(start: str) -> None:
    """The text that a failure prints is enough to have the network again."""
    architecture = Architecture(start, (5, 77, 1234))
    assert str(eval(repr(architecture)).build()[0]) == str(architecture.build()[0])
