import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.sparsity import select as module
from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import Bundle
from fxprune.sparsity.masks import Masks, is_subset, kept, total
from fxprune.sparsity.select import select

Scores = dict[str, torch.Tensor]

VALUES = {
    "normal": lambda shape: torch.randn(shape),
    "few values": lambda shape: torch.randint(-2, 3, shape).float(),
    "equal": lambda shape: torch.ones(shape),
    "wide": lambda shape: torch.exp(-80 * torch.rand(shape)),
    "mostly zero": lambda shape: (torch.rand(shape) - 0.7).clamp(min=0),
    "half precision": lambda shape: torch.randn(shape).half(),
    "double": lambda shape: torch.randn(shape, dtype=torch.float64) * 1e-300,
    "integers": lambda shape: torch.randint(0, 50, shape),
}


def scores_of(kind: str, sizes: list[int], seed: int) -> Scores:
    torch.manual_seed(seed)
    return {f"layer{i}": VALUES[kind]((size, 2)) for i, size in enumerate(sizes)}


def budget_for(scores: Scores, number: int, layers: dict[str, int] | None = None) -> Budget:
    return Budget(number, {name: score.numel() for name, score in scores.items()}, layers)


def by_sorting(scores: Scores, number: int, within: Masks | None = None) -> Masks:
    """The definition: a stable sort of everything."""
    flat = torch.cat([score.flatten().double() for score in scores.values()])
    if within is not None:
        flat = flat.where(torch.cat([within[name].flatten() for name in scores]), -math.inf)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:number]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def equal(left: Masks, right: Masks) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@given(
    st.sampled_from(sorted(VALUES)),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(0, 99),
    st.data(),
)
def test_equals_a_stable_sort(kind: str, sizes: list[int], seed: int, data: st.DataObject) -> None:
    scores = scores_of(kind, sizes, seed)
    number = data.draw(st.integers(0, 2 * sum(sizes)))
    if number:
        assert equal(select(scores, budget_for(scores, number)), by_sorting(scores, number))
    within = {name: torch.rand(score.shape) < 0.6 for name, score in scores.items()}
    number = min(number, total(within))
    if number:
        masks = select(scores, budget_for(scores, number), within=within)
        assert equal(masks, by_sorting(scores, number, within))
        assert is_subset(masks, within)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(VALUES)), st.integers(0, 99), st.floats(0.001, 0.999))
def test_the_sampled_search_equals_a_stable_sort(kind: str, seed: int, density: float) -> None:
    scores = scores_of(kind, [7000, 1, 5000, 20], seed)
    number = int(24042 * density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLE", 500)  # far fewer than there are scores
        assert equal(select(scores, budget_for(scores, number)), by_sorting(scores, number))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("lie", ["everything low", "everything high", "one tie"])
def test_a_misleading_sample_costs_time_only(
    density: float, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the sample sees (every stride-th score) is unlike what it does not see.
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_SAMPLE", 100)
    score = torch.rand(100, 100)
    flat = score.view(-1)
    flat[::101] = {"everything low": -1.0, "everything high": 2.0, "one tie": 0.5}[lie]
    flat[101 * 7] = 0.25
    number = int(10000 * density)
    assert equal(select({"a": score}, budget_for({"a": score}, number)), by_sorting({"a": score}, number))


def test_ties_go_to_the_lower_index_in_the_order_of_layers() -> None:
    scores = {"b": torch.tensor([[1.0, 2.0, 1.0]]), "a": torch.tensor([[1.0], [1.0]])}
    masks = select(scores, budget_for(scores, 3))
    assert masks["b"].tolist() == [[True, True, True]]
    assert masks["a"].tolist() == [[False], [False]]
    assert list(masks) == ["b", "a"]


def test_signed_zeros_are_ties() -> None:
    scores = {"a": torch.tensor([[-0.0, 0.0, -0.0]])}
    assert select(scores, budget_for(scores, 2))["a"].tolist() == [[True, True, False]]


def test_layers_of_the_budget_are_met_one_by_one() -> None:
    scores = scores_of("normal", [10, 20, 30], 0)
    layers = {"layer0": 0, "layer1": 40, "layer2": 7}
    assert kept(select(scores, budget_for(scores, 47, layers))) == layers


@pytest.mark.slow
@given(st.sampled_from(sorted(VALUES)), st.integers(1, 60), st.integers(1, 60))
def test_larger_budgets_contain_smaller_ones(kind: str, first: int, second: int) -> None:
    scores = scores_of(kind, [10, 20], 1)
    small, large = (select(scores, budget_for(scores, number)) for number in sorted((first, second)))
    assert is_subset(small, large)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(bad: float) -> None:
    scores = scores_of("normal", [4, 4], 0)
    scores["layer1"][3, 1] = bad
    with pytest.raises(ValueError, match="mine: scores of 'layer1' are not finite"):
        select(scores, budget_for(scores, 3), method="mine")


def test_scores_must_fit_the_budget() -> None:
    scores = scores_of("normal", [4, 4], 0)
    with pytest.raises(ValueError, match="mine: scores and prunable parameters differ at 'layer1'"):
        select({"layer0": scores["layer0"]}, budget_for(scores, 3), method="mine")
    with pytest.raises(ValueError, match="mine: 6 scores for the 8 weights of 'layer1'"):
        select(scores | {"layer1": torch.ones(3, 2)}, budget_for(scores, 3), method="mine")


def test_a_budget_beyond_what_is_left() -> None:
    scores = scores_of("normal", [4], 0)
    within = {"layer0": torch.zeros(4, 2, dtype=torch.bool)}
    within["layer0"][0, 0] = True
    with pytest.raises(ValueError, match=r"only 1 weights can be kept under Weight.*, 3 are asked for"):
        select(scores, budget_for(scores, 3), within=within)


def test_scores_stay_as_they_are() -> None:
    scores = scores_of("normal", [50], 3)
    scores["layer0"].requires_grad_()
    before = scores["layer0"].detach().clone()
    masks = select(scores, budget_for(scores, 10), within={"layer0": before > 0})
    assert torch.equal(scores["layer0"].detach(), before)
    assert not masks["layer0"].requires_grad


def test_nothing_near_the_whole_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.Tensor.sort

    def watched(self: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal largest
        largest = max(largest, self.numel())
        return plain(self, **options)

    monkeypatch.setattr(torch.Tensor, "sort", watched)
    scores = scores_of("normal", [1_000_000, 500_000], 0)
    assert total(select(scores, budget_for(scores, 300_000))) == 300_000
    assert largest <= 2 * module._SAMPLE


class Tied:
    """One group per row, over two parameters at once."""

    def bundles(self, scores: Scores, masks: Masks) -> list[Bundle]:
        rows = scores["a"].sum(1) + scores["b"].sum(1)

        def spread(chosen: torch.Tensor) -> Masks:
            return {name: chosen[:, None].expand(score.shape) for name, score in scores.items()}

        return [Bundle(("a", "b"), rows, 5, spread)]

    def room(self, masks: Masks) -> dict[str, int]:
        return kept(masks)


def test_groups_may_span_parameters() -> None:
    scores = {"a": torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]), "b": torch.zeros(3, 3)}
    masks = select(scores, budget_for(scores, 13), granularity=Tied())
    assert masks["a"][:, 0].tolist() == masks["b"][:, 2].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="'a' and 'b' are pruned together: use budget='global'"):
        select(scores, budget_for(scores, 10, {"a": 4, "b": 6}), granularity=Tied())


def test_whole_numbers_are_told_apart_however_large() -> None:
    """2^24 + 1 is no float32."""
    scores = {"a": torch.tensor([[2**24, 2**24 + 1, 2**24]])}
    chosen = select(scores, Budget(total=1, sizes={"a": 3}))
    assert chosen["a"].tolist() == [[False, True, False]]
