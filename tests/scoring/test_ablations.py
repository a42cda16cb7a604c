"""Shuffled masks, inverted scores and weights drawn anew."""

from typing import Any

import pytest
import torch
from methods.problems import TOY_A_DATA, half_square, problem, toy_a
from torch import nn

from fxprune import methods
from fxprune.methods import Method, from_scores, redraw
from fxprune.sparsity.granularity import NM, Block
from fxprune.sparsity.masks import Masks, is_subset, kept, total
from fxprune.sparsity.schedule import Exponential


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 6))


def same(left: Masks, right: Masks) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_shuffling_within_layers_keeps_their_counts() -> None:
    asked = problem(net(), 0.7)
    plain = methods.get("magnitude").find(asked)
    shuffled = methods.get("magnitude", shuffle="layer").find(asked)
    assert kept(shuffled) == kept(plain)
    assert not same(shuffled, plain)
    # Chance keeps a third of a layer's survivors in place.
    overlap = sum(int((plain[name] & shuffled[name]).sum()) for name in plain) / total(plain)
    assert 0.25 < overlap < 0.45


def test_shuffling_everything_keeps_the_total_and_evens_out_layers() -> None:
    asked = problem(net(), 0.7)
    shuffled = methods.get("magnitude", shuffle="global").find(asked)
    assert total(shuffled) == asked.budget.total
    assert all(0.2 < float(mask.float().mean()) < 0.4 for mask in shuffled.values())
    assert same(shuffled, methods.get("magnitude", shuffle="global").find(problem(net(), 0.7)))
    assert not same(shuffled, methods.get("magnitude", shuffle="global").find(problem(net(), 0.7, seed=1)))


@pytest.mark.parametrize("granularity", [NM(2, 4), Block(2, 2), Block(1, 1)])
def test_shuffling_respects_groups_and_starting_masks(granularity: Any) -> None:
    start = {name: torch.rand(w.shape) < 0.8 for name, w in problem(net()).weights.items()}
    asked = problem(net(), 0.75, masks=start, granularity=granularity)
    shuffled = methods.get("random", shuffle="layer").find(asked)
    assert is_subset(shuffled, start)
    if isinstance(granularity, NM):
        assert granularity.room(shuffled) == kept(shuffled)
        assert total(shuffled) == asked.budget.total


def test_a_global_shuffle_cannot_move_what_the_budget_fixes() -> None:
    with pytest.raises(ValueError, match="shuffle='global' moves weights between layers"):
        methods.get("magnitude", shuffle="global").find(problem(net(), 0.5, budget="erk"))


def test_inversion_keeps_the_smallest() -> None:
    # SNIP of TOY-A: 18 9 72 18 | 9 90; the smallest three by index are 9, 9 and the first 18.
    asked = problem(toy_a(), 3 / 6, data=TOY_A_DATA, loss_fn=half_square)
    masks = methods.get("snip", invert=True).find(asked)
    assert [mask.int().tolist() for mask in masks.values()] == [[[1, 1], [0, 0]], [[1, 0]]]


def test_inversion_in_rounds_is_nested_and_copes_with_zeros() -> None:
    seen: list[Masks] = []

    def half_zero(problem: methods.Problem, masks: Masks) -> methods.Scores:
        seen.append(masks)
        return {name: weight.clamp(min=0) for name, weight in problem.weights.items()}

    method = Method("own", from_scores(half_zero, schedule=Exponential(4)))
    masks = methods.resolve(method, invert=True).find(problem(net(), 0.8))
    assert all(is_subset(later, earlier) for earlier, later in zip(seen, [*seen[1:], masks], strict=True))
    assert not any(weight[masks[name]].clamp(min=0).any() for name, weight in problem(net()).weights.items())


def test_inverting_twice_is_the_method_itself() -> None:
    twice = methods.ablated(methods.get("magnitude", invert=True), invert=True)
    assert same(twice.find(problem(net(), 0.5)), methods.get("magnitude").find(problem(net(), 0.5)))


def test_methods_without_scores_cannot_be_inverted() -> None:
    walks = Method("walks", lambda problem: problem.masks, scored=False)
    with pytest.raises(ValueError, match="method 'walks' has no scores to invert"):
        methods.resolve(walks, invert=True)
    assert methods.resolve(walks, shuffle="layer").name == "walks"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shuffle": "even"}, ValueError, "shuffle='even', expected one of 'layer', 'global', None"),
        ({"shuffle": True}, ValueError, "shuffle=True, expected one of"),
        ({"invert": 1}, TypeError, "invert=1, expected bool"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], words: str) -> None:
    for method in ("magnitude", Method("own", lambda problem: problem.masks)):
        with pytest.raises(error, match=words):
            methods.resolve(method, **options)


def test_every_method_takes_them() -> None:
    common = methods.common_options()
    assert common["shuffle"].choices == ("layer", "global", None)
    assert common["invert"].default is False
    assert all(option.help for option in common.values())
    for name in methods.names():
        assert not common.keys() & methods.options(name).keys()
        if not methods.get(name).updates:  # new weights fit the method's own masks alone
            assert methods.get(name, shuffle="layer").name == name


def test_weights_are_drawn_anew_from_their_own_distribution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
    model(torch.randn(2, 3, 6, 6))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    redraw(model, torch.Generator().manual_seed(1))
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().flatten().sort().values, before[name].flatten().sort().values)
        assert p.requires_grad
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[1].weight, torch.ones(4))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_what_was_pruned_before_stays_where_it_is() -> None:
    layer = nn.Linear(20, 10)
    mask = torch.rand(10, 20) < 0.3
    with torch.no_grad():
        layer.weight.mul_(mask)
    before = layer.weight.detach().clone()
    redraw(layer, torch.Generator().manual_seed(1), {"weight": mask})
    assert torch.equal(layer.weight != 0, mask)
    assert not torch.equal(layer.weight, before)
