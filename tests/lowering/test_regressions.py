"""Every failure that a random network has ever shown, under a name."""

from __future__ import annotations

import pytest

from lowering.strategies import Architecture
from lowering.whole import assert_whole

FOUND = {
    # A transposed convolution that makes the image grow has a border even on a periodic image.
    "transposed convolution that grows": (
        Architecture("image", (8400, 46872, 12622, 16169, 3432, 45978, 2796)), 0.4, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    architecture, density, seed = FOUND[name]
    model, example = architecture.build()
    assert_whole(model, example, density, seed)
