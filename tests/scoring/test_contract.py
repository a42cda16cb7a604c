from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import pytest
import torch
from methods.problems import problem, toy_a
from torch import nn

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Method, Problem, Scores, from_scores, prune_in_rounds
from fxprune.scoring.contract import fixed_magnitudes
from fxprune.sparsity.granularity import NM, Block
from fxprune.sparsity.masks import Masks, is_subset, kept, total
from fxprune.sparsity.schedule import Exponential, Linear, OneShot

T = TypeVar("T")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def size(problem: Problem, masks: Masks) -> Scores:
    return {name: weight.abs() for name, weight in problem.weights.items()}


class Recorder:
    """A criterion that keeps the masks it was shown, and prefers what is pruned."""

    def __init__(self) -> None:
        self.seen: list[Masks] = []

    def __call__(self, problem: Problem, masks: Masks) -> Scores:
        self.seen.append(masks)
        return {name: (~mask).float() for name, mask in masks.items()}


def test_one_round_meets_the_budget() -> None:
    for budget in ("global", "uniform", "erk", {"0": 0.5}):
        asked = problem(net(), 0.7, budget=budget)
        masks = from_scores(size)(asked)
        assert total(masks) == asked.budget.total
        assert asked.budget.layers is None or kept(masks) == asked.budget.layers


def test_rounds_follow_the_schedule_and_are_nested() -> None:
    criterion = Recorder()
    asked = problem(net(), 0.9)  # 144 weights
    masks = from_scores(criterion, schedule=Exponential(4))(asked)
    counts = [total(seen) for seen in (*criterion.seen, masks)]
    # 14.4 -> 14 at last; relative target 14/144: 144 * (14/144)^(t/4)
    assert counts == [144, 80, 45, 25, 14]
    path = [*criterion.seen, masks]
    assert all(is_subset(later, earlier) for earlier, later in pairwise(path))


def test_regrowth_brings_pruned_weights_back() -> None:
    criterion = Recorder()
    masks = from_scores(criterion, schedule=Linear(3), regrow=True)(problem(net(), 0.5))
    path = [*criterion.seen, masks]
    assert not is_subset(path[2], path[1])
    assert total(masks) == 72


def test_regrowth_stays_within_the_starting_masks() -> None:
    start = {name: torch.rand(w.shape) < 0.6 for name, w in problem(net()).weights.items()}
    asked = problem(net(), 0.8, masks=start)
    for regrow in (False, True):
        masks = from_scores(Recorder(), schedule=Linear(5), regrow=regrow)(asked)
        assert is_subset(masks, start)
        assert total(masks) == asked.budget.total


def test_the_callers_schedule_goes_before_the_methods() -> None:
    criterion = Recorder()
    from_scores(criterion, schedule=Exponential(50))(problem(net(), 0.5, schedule=Linear(3)))
    assert len(criterion.seen) == 3
    criterion = Recorder()
    from_scores(criterion, schedule=Exponential(7))(problem(net(), 0.5, schedule="cubic"))
    assert len(criterion.seen) == 7


def test_a_function_as_schedule_ends_at_the_budget() -> None:
    criterion = Recorder()
    asked = problem(net(), 0.5, schedule=lambda t, rounds, target: 0.9)
    masks = from_scores(criterion, schedule=Exponential(3))(asked)
    assert [total(seen) for seen in criterion.seen] == [144, 130, 130]
    assert total(masks) == 72


def test_density_may_not_rise_unless_weights_regrow() -> None:
    def bumpy(t: int, rounds: int, target: float) -> float:
        return 0.6 if t == 1 else 0.9

    asked = problem(net(), 0.5, schedule=bumpy)
    with pytest.raises(ValueError, match="schedule: 86 weights before round 2, 130 after; it must not rise"):
        from_scores(size, schedule=Exponential(4))(asked)
    assert total(from_scores(size, schedule=Exponential(4), regrow=True)(asked)) == 72


def test_nothing_to_prune_needs_no_scores() -> None:
    def never(problem: Problem, masks: Masks) -> Scores:
        raise AssertionError("scored")

    masks = from_scores(never, schedule=Exponential(9))(problem(net(), 0.0))
    assert all(bool(mask.all()) for mask in masks.values())


def test_patterns_hold_from_the_first_round_on() -> None:
    criterion = Recorder()
    asked = problem(net(), 0.6, granularity=NM(2, 4))
    masks = from_scores(criterion, schedule=Linear(4))(asked)
    assert total(masks) == asked.budget.total == 58
    assert total(criterion.seen[1]) == 72  # 122 by the schedule, but the pattern keeps half


def test_a_pattern_without_room_is_refused_before_any_work() -> None:
    criterion = Recorder()
    with pytest.raises(
        ValueError, match=r"granularity NM\(n=2, m=4\) has room for 72 weights in the model, 101"
    ):
        from_scores(criterion)(problem(net(), 0.3, granularity=NM(2, 4)))
    with pytest.raises(ValueError, match=r"has room for 48 weights in 0.weight, 67"):
        from_scores(criterion)(problem(net(), 0.3, budget="uniform", granularity=NM(2, 4)))
    assert not criterion.seen


def test_groups_through_many_rounds() -> None:
    masks = from_scores(size, schedule=Exponential(60))(problem(net(), 0.8, granularity=Block(3, 5)))
    assert 0 < total(masks) <= 29


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_name_method_and_layer(bad: float) -> None:
    def broken(problem: Problem, masks: Masks) -> Scores:
        return {
            name: torch.full_like(w, bad if name == "2.weight" else 1.0)
            for name, w in problem.weights.items()
        }

    with pytest.raises(ValueError, match=r"broken: scores of '2.weight' are not finite"):
        from_scores(broken)(problem(net()))
    with pytest.raises(ValueError, match=r"mine: scores of '2.weight' are not finite"):
        from_scores(broken, name="mine")(problem(net()))


def test_progress_sees_every_round_and_may_be_interrupted() -> None:
    steps: list[tuple[int, str, int]] = []

    def bar(items: Iterable[T], description: str, total: int) -> Iterator[T]:
        for index, item in enumerate(items):
            if index == 3:
                raise KeyboardInterrupt
            steps.append((index, description, total))
            yield item

    asked = problem(net(), 0.9, progress=bar)
    with pytest.raises(KeyboardInterrupt):
        from_scores(size, schedule=Exponential(10), name="mine")(asked)
    assert steps == [(0, "mine", 10), (1, "mine", 10), (2, "mine", 10)]
    assert all(bool(mask.all()) for mask in asked.masks.values())


def test_methods_say_what_they_need() -> None:
    needy = Method("needy", from_scores(size), needs=frozenset({"data"}))
    with pytest.raises(ValueError, match=r"method 'needy' needs data=\.\.\."):
        needy.check(data=None)
    needy.check(data=(torch.ones(1), torch.ones(1)))
    Method("free", from_scores(size)).check(data=None)


def test_prune_in_rounds_is_the_same_door() -> None:
    asked = problem(toy_a(), 0.5)
    masks = prune_in_rounds(asked, size, schedule=OneShot(), regrow=False, name="size")
    # |w| = 1 1 2 1 | 1 2, three of six: the twos, then the first of the ones.
    assert [mask.tolist() for mask in masks.values()] == [[[True, False], [True, False]], [[False, True]]]


def test_fixed_magnitudes_have_values_beside_weights_that_have_none() -> None:
    gm = capture(net(), torch.ones(1, 8))
    asked = problem(gm, 0.5, graph=lower(gm))
    split = replace(asked, weights={"0.weight": asked.weights["0.weight"].to("meta")})
    (found,) = fixed_magnitudes(split).values()
    assert torch.equal(found, asked.weights["2.weight"].abs())


def test_a_criterion_that_writes_to_the_weights_is_refused() -> None:
    def careless(problem: Problem, masks: Masks) -> Scores:
        return {name: weight.abs_() for name, weight in problem.weights.items()}

    method = Method("careless", from_scores(careless, name="careless"))
    with pytest.raises(ValueError, match=r"'careless': its criterion wrote to problem.weights\['0.weight'\]"):
        fxprune.apply(
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), method, 0.5, example_inputs=torch.ones(1, 3)
        )
