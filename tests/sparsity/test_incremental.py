"""Removal against a stable sort of everything, round after round."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.sparsity import incremental
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.incremental import Dense, Gain, Outer, Survivors
from fxprune.sparsity.masks import Masks, dense, is_subset, kept, total

VALUES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "uniform": torch.rand,
    "few values": lambda shape: torch.randint(0, 3, shape).float(),
    "equal": torch.ones,
    "zero": torch.zeros,
    "wide": lambda shape: torch.exp(-80 * torch.rand(shape)),
    "mostly zero": lambda shape: (torch.rand(shape) - 0.7).clamp(min=0),
    "subnormal": lambda shape: torch.rand(shape) * 1e-40,
}
SHAPES = [(5, 3), (4, 6, 3, 3), (1, 1), (2, 7, 1, 1), (30, 20)]


def gains_of(kind: str, shapes: dict[str, torch.Size]) -> dict[str, Gain]:
    """One of each form: by row and column (with one row or more of positions), by kernel, by weight."""
    found: dict[str, Gain] = {}
    for place, (name, shape) in enumerate(shapes.items()):
        rows, columns = shape[:2]
        if place % 3 == 0:
            found[name] = Outer(VALUES[kind]((1, rows)), VALUES[kind]((1, columns)), torch.sqrt)
        elif place % 3 == 1:
            # Integers: sums do not depend on how a matrix product is cut into pieces.
            found[name] = Outer(VALUES["few values"]((2, rows)), VALUES["few values"]((2, columns)))
        else:
            taps = 1 if place % 2 else shape[2:].numel()
            found[name] = Dense(VALUES[kind]((rows, columns, taps)))
    return found


def scores_of(values: dict[str, Tensor], gains: dict[str, Gain]) -> dict[str, Tensor]:
    found = {}
    for name, value in values.items():
        kernels = value.reshape(*value.shape[:2], -1)
        found[name] = (kernels * gains[name].rows(0, len(value))).view(value.shape)
    return found


def lowest_by_sorting(scores: dict[str, Tensor], masks: Masks, budget: Budget) -> Masks:
    groups = [list(scores)] if budget.layers is None else [[name] for name in scores]
    chosen: Masks = {}
    for names in groups:
        number = budget.total if budget.layers is None else budget.layers[names[0]]
        flat = torch.cat([scores[name].where(masks[name], -1.0).flatten() for name in names])
        stays = torch.zeros_like(flat, dtype=torch.bool)
        stays[flat.argsort(descending=True, stable=True)[:number]] = True
        parts = stays.split([scores[name].numel() for name in names])
        chosen |= {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}
    return chosen


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(VALUES)),
    st.sampled_from(sorted(VALUES)),
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([7, 64, 1 << 20]),
    st.sampled_from([1, 40, 1 << 20]),
    st.data(),
)
def test_equals_a_stable_sort(
    kind: str, gain: str, shapes: list[tuple[int, ...]], seed: int, by_layer: bool,
    chunk: int, sample: int, data: st.DataObject,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    values = {f"layer{place}": VALUES[kind](shape) for place, shape in enumerate(shapes)}
    masks = {name: torch.rand(value.shape) < 0.8 for name, value in values.items()}
    sizes = {name: value.numel() for name, value in values.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incremental, "_CHUNK", chunk)
        patch.setattr(incremental, "_SAMPLE", sample)
        weights = Survivors({name: value.clone() for name, value in values.items()}, masks)
        for _ in range(4):
            gains = gains_of(gain, {name: value.shape for name, value in values.items()})
            left = kept(masks)
            layers = {name: data.draw(st.integers(0, left[name])) for name in left} if by_layer else None
            number = sum(layers.values()) if layers else data.draw(st.integers(0, sum(left.values())))
            budget = Budget(number, sizes, layers)
            expected = lowest_by_sorting(scores_of(values, gains), masks, budget)
            pruned = weights.reduce(gains, budget)
            found = weights.masks()
            assert all(torch.equal(found[name], expected[name]) for name in values)
            for name, index in pruned.items():
                gone = (masks[name] & ~found[name]).flatten().nonzero().flatten()
                assert torch.equal(index, gone)
            masks = found
            assert weights.left == kept(masks)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("lie", ["low", "high", "one tie"])
def test_a_misleading_sample_costs_time_only(share: float, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the sample sees is unlike what it does not see.
    torch.manual_seed(0)
    monkeypatch.setattr(incremental, "_SAMPLE", 100)
    value = torch.rand(100, 100) + 1
    value.view(-1)[::101] = {"low": 0.5, "high": 3.0, "one tie": 1.5}[lie]
    weights = Survivors({"a": value.clone()}, dense({"a": value}))
    assert torch.equal(weights._samples["a"].index, torch.arange(0, 10000, 101))
    gains: dict[str, Gain] = {"a": Dense(torch.ones(100, 100, 1))}
    budget = Budget(int(10000 * (1 - share)), {"a": 10000})
    weights.reduce(gains, budget)
    expected = lowest_by_sorting({"a": value}, dense({"a": value}), budget)
    assert torch.equal(weights.masks()["a"], expected["a"])


def test_little_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    value = torch.rand(1000, 1500)
    weights = Survivors({"a": value}, dense({"a": value}))
    seen = []
    low = incremental._low

    def watched(lanes: Tensor, bound: float, limit: int) -> tuple[Tensor, Tensor]:
        found = low(lanes, bound, limit)
        seen.append(len(found[0]))
        return found

    monkeypatch.setattr(incremental, "_low", watched)
    for left in (1_470_000, 1_440_000, 1_410_000):
        seen.clear()
        weights.reduce({"a": Dense(torch.ones(1000, 1500, 1))}, Budget(left, {"a": 1_500_000}))
        assert 30_000 <= sum(seen) <= 40_000


def test_selection_takes_over_where_much_goes() -> None:
    values = {"a": torch.rand(10, 10), "b": torch.rand(10, 10)}
    weights = Survivors(values, dense(values))
    sizes = {"a": 100, "b": 100}
    assert weights.is_large(Budget(149, sizes))
    assert not weights.is_large(Budget(150, sizes))
    assert weights.is_large(Budget(174, sizes, {"a": 74, "b": 100}))
    assert not weights.is_large(Budget(150, sizes, {"a": 75, "b": 75}))


def test_scores_and_restriction() -> None:
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    start = torch.tensor([[True, False, True], [True, True, True]])
    weights = Survivors({"a": value}, {"a": start})
    gains: dict[str, Gain] = {"a": Outer(torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 1.0, 2.0]]))}
    assert weights.scores(gains)["a"].tolist() == [[1.0, 0.0, 6.0], [40.0, 50.0, 120.0]]
    masks = {"a": torch.tensor([[True, False, False], [True, True, False]])}
    assert {name: index.tolist() for name, index in weights.restrict(masks).items()} == {"a": [2, 5]}
    assert is_subset(weights.masks(), masks)
    assert total(weights.masks()) == weights.left["a"] == 3


def test_pruned_weights_are_never_low() -> None:
    # Not even where the gain is zero, or what is asked for is all that is left.
    value = torch.tensor([[1.0, 2.0, 3.0]])
    weights = Survivors({"a": value}, {"a": torch.tensor([[False, True, True]])})
    assert math.isnan(float(weights.values["a"][0, 0]))
    assert weights.reduce({"a": Dense(torch.zeros(1, 3, 1))}, Budget(0, {"a": 3}))["a"].tolist() == [1, 2]
