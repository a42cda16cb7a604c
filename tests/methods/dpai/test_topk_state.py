"""The top-k of DPaI's scores, kept up to date or not, against ``fxprune.sparsity.select.select``.

Coarse scores and rises are full of ties, and their sums are exact: ties go to the lower index there too.
"""

from collections.abc import Mapping

import pytest
import torch
from thinning import one_in
from torch import Tensor

from fxprune.methods.dpai.layer_topk import MaskTopK
from fxprune.methods.dpai.topk_state import GranularTopK, UnitTopK, group_layers
from fxprune.sparsity.granularity import WEIGHT
from methods.dpai.selection import STEPS, drawn, selected


def risen(scores: Mapping[str, Tensor], state: UnitTopK | MaskTopK) -> dict[str, Tensor]:
    return {name: score + state.rise[state.units_of(name)].unsqueeze(1) for name, score in scores.items()}


@pytest.mark.thinned(4)
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
