"""Taps lead to positions, one by one; weights of zero are drawn."""

from __future__ import annotations

import pytest
import torch

from fxprune.graph import ir
from fxprune.methods.phew.kernel_transition import TapMoves
from fxprune.paths.layout import collapsed, explicit


def moves(kernel: int, stride: int, before: int, *, transposed: bool = False, dilation: int = 1) -> TapMoves:
    """Taps between a large image of 4 positions and a small one of ``4 / stride``, along one axis."""
    window = ir.Window((kernel,), (stride,), ((before, before),), (dilation,), transposed=transposed)
    large, small = (explicit(4),), (explicit(4 // stride),)
    return TapMoves(window, small, large) if transposed else TapMoves(window, large, small)


def draw(number: int) -> torch.Tensor:
    return torch.zeros(number, dtype=torch.float64)


def go(found: TapMoves, way: str, positions: list[int], taps: list[int]) -> list[int]:
    result: torch.Tensor = getattr(found, way)(torch.tensor(positions), torch.tensor(taps), draw)
    return result.tolist()


def test_a_stride_stops_at_every_other_position() -> None:
    strided = moves(1, 2, 0)
    assert go(strided, "forward", [0, 1, 2, 3], [0] * 4) == [0, -1, 1, -1]
    assert go(strided, "backward", [0, 1], [0, 0]) == [0, 2]


def test_taps_move_by_their_offset_around_the_image() -> None:
    # Tap t of output p reads position 2 p + t - 1.
    strided = moves(3, 2, 1)
    assert go(strided, "forward", [1, 1, 1], [0, 1, 2]) == [1, -1, 0]
    assert go(strided, "forward", [3, 3, 3], [0, 1, 2]) == [0, -1, 1]
    assert go(strided, "backward", [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2) == [3, 0, 1, 1, 2, 3]
    dilated = moves(2, 1, 0, dilation=3)
    assert go(dilated, "backward", [0, 2], [1, 1]) == [3, 1]


def test_a_transposed_convolution_goes_the_other_way() -> None:
    turned = moves(2, 2, 0, transposed=True)
    assert go(turned, "forward", [0, 0, 1, 1], [0, 1, 0, 1]) == [0, 1, 2, 3]
    assert go(turned, "backward", [0, 1, 1, 3], [0, 0, 1, 1]) == [0, -1, 0, 1]


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_ways_there_and_back_agree(way: str) -> None:
    found, back = moves(3, 2, 1), {"forward": "backward", "backward": "forward"}[way]
    here = 4 if way == "forward" else 2
    for position in range(here):
        for tap in range(3):
            (there,) = go(found, way, [position], [tap])
            if there >= 0:
                assert go(found, back, [there], [tap]) == [position]


def test_collapsed_positions_are_drawn_anew() -> None:
    window = ir.Window((1,), (2,), ((0, 0),), (1,))
    found = TapMoves(window, (collapsed(4),), (explicit(2),))
    places = {
        found.forward(torch.tensor([0]), torch.tensor([0]), lambda n, c=chance: torch.full((n,), c)).item()
        for chance in (0.0, 0.25, 0.5, 0.75)
    }
    assert places == {-1, 0, 1}
