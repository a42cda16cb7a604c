"""The top-k of one large layer, kept up to date, against that of ``select``."""

import pytest
import torch

from fxprune.methods.dpai.layer_topk import IndexTopK, MaskTopK, keeps_few
from fxprune.methods.dpai.topk_state import make_topk
from methods.dpai.selection import STEPS, drawn, selected


@pytest.mark.parametrize("number", [0, 1, 30, 191])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_mask_of_a_layer_is_that_of_select(number: int, is_coarse: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    start = drawn(generator, (200, 1), 4, is_coarse)
    start[:9] = -torch.inf
    state, layers = make_topk({"a": start.clone()}, {"a": number}), {"a": number}
    assert isinstance(state, MaskTopK)
    for step in range(STEPS):
        rise = drawn(generator, (200,), 4, is_coarse)
        state.rise.add_(rise * (torch.rand(200, generator=generator) < 0.2))
        before = state.counts.copy()
        assert set(state.update()) == set((before != state.counts).nonzero()[0])
        assert (
            state.counts.tolist() == selected({"a": state.rise.unsqueeze(1)}, layers)["a"].flatten().tolist()
        )
        if step == STEPS // 2:
            layers = {"a": number // 2}
            state.set_budget(layers)


@pytest.mark.parametrize("number", [0, 1, 12, 191])
@pytest.mark.parametrize("longest", [1.0, 0.125, 0.03125])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_indices_of_a_layer_are_those_of_select(number: int, longest: float, is_coarse: bool) -> None:
    """Rises reach their bound, so that weights come from as far as they can between two full scans."""
    generator = torch.Generator().manual_seed(2)
    start = drawn(generator, (200, 1), 4, is_coarse)
    start[:9] = -torch.inf
    state, layers = IndexTopK({"a": start.clone()}, {"a": number}, longest), {"a": number}
    for step in range(STEPS):
        rise = drawn(generator, (200,), 4, is_coarse) * longest
        rise[step % 7 :: 11] = longest
        state.rise.add_(rise * (torch.rand(200, generator=generator) < 0.4))
        before = state.kept.tolist()
        for block in (slice(0, 64), slice(64, 200)):
            state.scan(block)
        assert state.update() == (before != state.kept.tolist())
        expected = selected({"a": state.rise.unsqueeze(1)}, layers)["a"].flatten()
        assert state.kept.tolist() == expected.nonzero().flatten().tolist()
        if step == STEPS // 2:
            layers = {"a": number // 2}
            state.set_budget(layers)


def test_one_that_climbs_from_far_below_enters_between_two_full_scans() -> None:
    """By 3/16 in the 6 steps after a full scan, at the longest step allowed: it enters in the seventh."""
    longest = 1 / 32
    start = torch.zeros(40, 1)
    start[5] = 7 * longest  # the only one kept
    state = IndexTopK({"a": start}, {"a": 1}, longest)
    kept = []
    for _ in range(8):
        state.rise[30] += longest
        state.scan(slice(0, 40))
        state.update()
        kept.append(state.kept.tolist())
    assert kept == [[5]] * 7 + [[30]]


def test_indices_are_for_layers_that_keep_less_than_one_weight_in_sixteen() -> None:
    assert keeps_few(161, 10)
    assert not keeps_few(160, 10)
