import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.sparsity.budget import Budget
from fxprune.sparsity.granularity import CHANNEL, KERNEL, NM, WEIGHT, Block, Channel, Granularity, resolve
from fxprune.sparsity.masks import Masks, is_subset, total
from fxprune.sparsity.select import select

SHAPES = {
    "stem": (4, 3, 3, 3),
    "conv": (6, 4, 1, 1),
    "depthwise": (6, 1, 3, 3),
    "fc": (5, 6),
    "sequence": (4, 6, 5),
}


def scores(seed: int, *, ties: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.randint(0, 3, shape).float() if ties else torch.rand(shape)
        for name, shape in SHAPES.items()
    }


def budget(number: int, layers: dict[str, int] | None = None) -> Budget:
    return Budget(number, {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}, layers)


def group_ids(granularity: Block | Channel, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the group of each weight, from the definition; a channel without a graph is a row."""
    height, width = (1, None) if isinstance(granularity, Channel) else (granularity.rows, granularity.columns)
    rows = torch.arange(shape[0]) // height
    columns = torch.arange(shape[1]) // (width or shape[1])
    ids = rows[:, None] * (int(columns.max()) + 1) + columns
    return ids.view(*ids.shape, *[1] * (len(shape) - 2)).expand(shape)


def greedily(granularity: Block | Channel, values: dict[str, torch.Tensor], masks: Masks, room: int) -> Masks:
    """The definition: one group after the other, by score, each that still fits."""
    groups = []
    for name, score in values.items():
        ids = group_ids(granularity, tuple(score.shape))
        for index in range(int(ids.max()) + 1):
            members = (ids == index) & masks[name]
            if members.any():
                groups.append((float(score[members].double().sum()), name, members))
    chosen = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for _, name, members in sorted(groups, key=lambda group: -group[0]):  # stable
        if int(members.sum()) <= room:
            room -= int(members.sum())
            chosen[name] |= members
    return chosen


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.sampled_from([KERNEL, CHANNEL, Block(2, 2), Block(16, 16), Block(4, 1)]),
    st.integers(0, 99),
    st.booleans(),
    st.data(),
)
def test_groups_are_taken_greedily(
    granularity: Block | Channel, seed: int, pruned: bool, data: st.DataObject
) -> None:
    values = scores(seed, ties=True)
    masks = {name: torch.rand(score.shape) < (0.7 if pruned else 1.1) for name, score in values.items()}
    number = data.draw(st.integers(1, total(masks)))
    expected = greedily(granularity, values, masks, number)
    if not total(expected):
        with pytest.raises(ValueError, match="smaller than the smallest group"):
            select(values, budget(number), within=masks, granularity=granularity)
        return
    found = select(values, budget(number), within=masks, granularity=granularity)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("granularity", [KERNEL, CHANNEL, Block(2, 3)])
def test_groups_are_whole(granularity: Block | Channel) -> None:
    masks = select(scores(1), budget(150), granularity=granularity)
    assert 0 < total(masks) <= 150
    for mask in masks.values():
        ids = group_ids(granularity, tuple(mask.shape))
        for index in ids.unique():
            assert mask[ids == index].unique().numel() == 1


def test_a_kernels_score_is_the_sum_of_its_taps() -> None:
    # Three kernels of two taps: sums 3, 4, 0. Four weights keep the first two.
    score = {"a": torch.tensor([[[1.0, 2.0], [4.0, 0.0], [5.0, -5.0]]])}
    found = select(score, Budget(4, {"a": 6}), granularity=KERNEL)["a"]
    assert found.tolist() == [[[True, True], [True, True], [False, False]]]


def test_a_group_that_does_not_fit_is_passed_over() -> None:
    # Channels with 4, 3 and 1 weights left, in the order of their scores. Of 5: 4, then not 3, but 1.
    mask = torch.tensor([[True, True, True, True], [True, True, True, False], [True, False, False, False]])
    score = torch.tensor([[3.0], [2.0], [1.0]]).expand(3, 4)
    found = select({"a": score}, Budget(5, {"a": 12}), within={"a": mask}, granularity=CHANNEL)["a"]
    assert found.sum(1).tolist() == [4, 0, 1]


def test_layers_are_met_from_below() -> None:
    layers = {"stem": 60, "conv": 5, "depthwise": 20, "fc": 0, "sequence": 119}
    masks = select(scores(0), budget(sum(layers.values()), layers), granularity=KERNEL)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "stem": 54, "conv": 5, "depthwise": 18, "fc": 0, "sequence": 115
    }  # fmt: skip


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.sampled_from([NM(2, 4), NM(1, 2), NM(1, 4), NM(3, 3)]), st.integers(0, 99), st.booleans(), st.data()
)
def test_n_of_m(granularity: NM, seed: int, pruned: bool, data: st.DataObject) -> None:
    values = scores(seed, ties=seed % 2 == 0)
    within = {name: torch.rand(score.shape) < (0.7 if pruned else 1.1) for name, score in values.items()}
    room = sum(granularity.room(within).values())
    number = data.draw(st.integers(1, room))
    masks = select(values, budget(number), within=within, granularity=granularity)
    assert total(masks) == number
    assert is_subset(masks, within)
    for mask in masks.values():
        for start in range(0, mask.shape[1], granularity.m):
            assert int(mask[:, start : start + granularity.m].sum(1).max()) <= granularity.n
    with pytest.raises(ValueError, match=rf"only {room} weights can be kept under NM"):
        select(values, budget(room + 1), within=within, granularity=granularity)


def test_two_of_four_keeps_the_best_two() -> None:
    score = {"a": torch.tensor([[3.0, 1.0, 2.0, 2.0, 9.0, 8.0, 7.0, 6.0]])}
    found = select(score, Budget(4, {"a": 8}), granularity=NM(2, 4))["a"]
    assert found.tolist() == [[True, False, True, False, True, True, False, False]]


def test_sums_of_huge_scores_stay_finite() -> None:
    score = {"a": torch.full((2, 2, 3, 3), 3e38)}
    assert total(select(score, Budget(18, {"a": 36}), granularity=KERNEL)) == 18


def test_names() -> None:
    assert resolve("weight") is WEIGHT
    assert resolve("kernel") is KERNEL
    assert resolve("Channel") is CHANNEL
    assert resolve("nm(2, 4)") == NM(2, 4)
    assert resolve("block(16,8)") == Block(16, 8)
    own = NM(1, 8)
    assert resolve(own) is own
    assert all(isinstance(known, Granularity) for known in (WEIGHT, KERNEL, NM(2, 4)))


@pytest.mark.parametrize(
    ("granularity", "error", "words"),
    [
        ("filter", ValueError, "granularity='filter': expected one of 'weight', 'kernel', 'channel'"),
        ("nm(5,4)", ValueError, r"nm\(5,4\): expected 1 <= n <= m"),
        ("nm(0,4)", ValueError, r"nm\(0,4\)"),
        ("block(0,4)", ValueError, r"block\(0,4\): expected two sizes"),
        (4, TypeError, "granularity=4"),
        (NM, TypeError, "expected a name such as 'weight'"),
    ],
)
def test_bad_names(granularity: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve(granularity)  # type: ignore[arg-type]


def test_no_weight_is_counted_twice() -> None:
    # Kernels of one weight in "a", of nine in "b". Of 12: both of "a", one of "b", and 1 stays unspent.
    values = {"a": torch.tensor([[5.0, 4.0]]), "b": torch.ones(2, 1, 3, 3) / 9}
    found = select(values, Budget(12, {"a": 2, "b": 18}), granularity=KERNEL)
    assert [int(mask.sum()) for mask in found.values()] == [2, 9]
