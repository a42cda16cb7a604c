"""The top-k of DPaI's scores, kept up to date or not, against ``fxprune.sparsity.select.select``.

Coarse scores and rises are full of ties, and their sums are exact: ties go to the lower index there too.
"""

from collections.abc import Mapping

import pytest
import torch
from thinning import one_in
from torch import Tensor

from fxprune.methods.dpai.accelerator import top_k_mask
from fxprune.methods.dpai.layer_topk import IndexTopK, MaskTopK, keeps_few
from fxprune.methods.dpai.topk_state import GranularTopK, UnitTopK, group_layers, make_topk
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import WEIGHT
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.select import select

STEPS = 80


def selected(scores: Mapping[str, Tensor], layers: Mapping[str, int]) -> Masks:
    """The definition; ``-inf`` is for weights that may not be kept."""
    within = {name: score > -torch.inf for name, score in scores.items()}
    finite = {name: score.where(within[name], 0.0) for name, score in scores.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    return select(finite, Budget(sum(layers.values()), sizes, dict(layers)), within=within)


def drawn(generator: torch.Generator, shape: tuple[int, ...], levels: int, is_coarse: bool) -> Tensor:
    values = torch.rand(shape, generator=generator)
    return (values * levels).round() / levels if is_coarse else values


def risen(scores: Mapping[str, Tensor], state: UnitTopK | MaskTopK) -> dict[str, Tensor]:
    return {name: score + state.rise[state.units_of(name)].unsqueeze(1) for name, score in scores.items()}


@pytest.mark.parametrize(
    ("layers", "width", "is_coarse", "levels"),
    one_in(2, [("a",), ("a", "b", "c")], [1, 3, 9], [False, True], [4, 8]),
)
def test_counts_of_units_are_those_of_select(
    layers: tuple[str, ...], width: int, is_coarse: bool, levels: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    sizes = {name: {"a": 40, "b": 7, "c": 1}[name] for name in layers}
    scores = {name: drawn(generator, (size, width), levels, is_coarse) for name, size in sizes.items()}
    scores["a"][3] = -torch.inf
    budgets = [{"a": 11, "b": 7 * width, "c": 0}, {"a": 5, "b": 3, "c": 1}, {"a": 0, "b": 1, "c": width}]
    budgets = [{name: budget[name] for name in layers} for budget in budgets]
    state, units = UnitTopK(scores, budgets[0]), sum(sizes.values())
    for step in range(3 * STEPS):
        budget = budgets[step // STEPS]
        if step % STEPS == 0:
            state.set_budget(budget)
        else:
            rise = drawn(generator, (units,), levels, is_coarse) * 0.125
            state.rise.add_(rise * (torch.rand(units, generator=generator) < 0.2))
            before = state.counts.copy()
            assert set(state.update()) == set((before != state.counts).nonzero()[0])
        masks = selected(risen(scores, state), budget)
        for name in layers:
            assert state.counts[state.units_of(name)].tolist() == masks[name].sum(1).tolist(), (step, name)


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


@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_mask_without_waiting_is_that_of_select(is_coarse: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = drawn(generator, (11, 3), 4, is_coarse)
    scores[2] = -torch.inf
    for number in range(31):
        assert torch.equal(top_k_mask(scores, number), selected({"a": scores}, {"a": number})["a"])


def test_single_weights_as_groups_are_those_of_select() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = {name: drawn(generator, (size, 1), 4, True) for name, size in (("a", 12), ("b", 6))}
    within = {"a": torch.rand(4, 3, generator=generator) < 0.8, "b": torch.ones(2, 3, dtype=torch.bool)}
    layers = {"a": 4, "b": 6}
    state = GranularTopK.factory(WEIGHT, within)(scores, layers)
    for _ in range(10):
        state.rise.add_(drawn(generator, (18,), 4, True))
        assert state.update().tolist() == list(range(18))
        now = {
            name: (score.flatten() + state.rise[state.units_of(name)]).where(
                within[name].flatten(), -torch.inf
            )
            for name, score in scores.items()
        }
        masks = selected(now, layers)
        for name in scores:
            assert state.counts[state.units_of(name)].tolist() == masks[name].tolist()


def test_layers_are_grouped_up_to_the_limit() -> None:
    widths, sizes = {"a": 1, "b": 1, "c": 9, "d": 1}, {"a": 5, "b": 4, "c": 1, "d": 90}
    assert group_layers(widths, sizes, 9) == [["a", "b"], ["c"], ["d"]]
    assert group_layers(widths, sizes, 8) == [["a"], ["b"], ["c"], ["d"]]
    assert group_layers(widths, sizes, 90) == [["a", "b", "c"], ["d"]]
    assert group_layers(widths, sizes, 900) == [["a", "b", "c", "d"]]


def test_indices_are_for_layers_that_keep_less_than_one_weight_in_sixteen() -> None:
    assert keeps_few(161, 10)
    assert not keeps_few(160, 10)
