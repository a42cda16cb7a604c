"""The rounds of SynFlow and its variants against the naive loop: score all, sort all, repeat."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from methods.problems import problem
from nets import NETS
from thinning import one_in
from torch import Tensor, nn
from torch.nn.functional import softplus

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.paths.circuit.circuit import Circuit, Pass
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow
from fxprune.sparsity.granularity import CHANNEL, KERNEL, NM, Granularity
from fxprune.sparsity.incremental import Survivors
from fxprune.sparsity.masks import Masks, is_subset, kept, total
from fxprune.sparsity.schedule import Exponential
from fxprune.sparsity.select import select

Score = Callable[[Tensor, Tensor, float], Tensor]
"""``(|w|, d ln R / d edge, ln R) -> score``"""

VARIANTS: dict[str, tuple[str, dict[str, str], Callable[[Tensor], Tensor], Score]] = {
    "synflow": ("synflow", {}, lambda w: w, lambda w, g, r: w * g),
    "squared": ("synflow-l2", {}, torch.square, lambda w, g, r: w * w * g),
    "linear": ("synflow-l2", {"form": "linear"}, torch.square, lambda w, g, r: w * g),
    "log": ("logsynflow", {}, lambda w: w, lambda w, g, r: w * softplus(g.log() + r)),
}
ROUNDS = 12
EXACT = ["conv_chain", "residual", "multihead", "vit"]


def asked(net: str, sparsity: float = 0.8, **fields: Any) -> Problem:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    gm = capture(model, inputs)
    graph = lower(gm)
    weights = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    return problem(gm, sparsity, graph=graph, only=weights, **fields)


def scores_of(question: Problem, variant: str, resolution: str, masks: Masks) -> dict[str, Tensor]:
    """By the formula, in float64, everything anew."""
    _, _, edge, score = VARIANTS[variant]
    every = {
        name: question.model.get_parameter(name).detach().abs().double() for name in question.graph.kernels
    }
    alive = {name: w * masks[name] if name in masks else w for name, w in every.items()}
    edges = {name: edge(w) for name, w in alive.items()}
    found = flow(
        question.graph, edges, resolution=resolution, pool="mean", products="mean", dtype=torch.float64
    )
    return {name: score(alive[name], found.gradients[name], found.log_total) for name in masks}


def naive(question: Problem, variant: str, resolution: str) -> Masks:
    masks, start, schedule = question.masks, kept(question.masks), Exponential(ROUNDS)
    for t in range(1, ROUNDS + 1):
        budget = question.budget
        if t < ROUNDS:
            budget = budget.towards(lambda target, t=t: schedule.density(t, target), start)
        scores = scores_of(question, variant, resolution, masks)
        masks = select(
            {name: -score for name, score in scores.items()} if question.invert else scores,
            budget.capped(question.granularity.room(masks)),
            within=masks,
            granularity=question.granularity,
        )
    return masks


def found_by(question: Problem, variant: str, resolution: str) -> Masks:
    name, options, _, _ = VARIANTS[variant]
    return methods.get(name, rounds=ROUNDS, resolution=resolution, **options).find(question)


def agree(masks: Masks, expected: Masks) -> bool:
    return list(masks) == list(expected) and all(torch.equal(masks[name], expected[name]) for name in masks)


@pytest.fixture
def after_rounds(monkeypatch: pytest.MonkeyPatch) -> list[Masks]:
    """The masks after every round."""
    seen: list[Masks] = []
    prune = Survivors._prune

    def recording(self: Survivors, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
        result = prune(self, pruned)
        seen.append(self.masks())
        return result

    monkeypatch.setattr(Survivors, "_prune", recording)
    return seen


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("net", "variant", "resolution"), one_in(8, NETS, VARIANTS, ["channel", "spatial"]))
def test_every_round_prunes_the_lowest_scores(
    after_rounds: list[Masks], net: str, variant: str, resolution: str
) -> None:
    question = asked(net)
    found_by(question, variant, resolution)
    assert len(after_rounds) == ROUNDS
    before = question.masks
    for masks in after_rounds:
        scores = scores_of(question, variant, resolution, before)
        stay = torch.cat([scores[name][masks[name]] for name in masks])
        go = torch.cat([scores[name][before[name] & ~masks[name]] for name in masks])
        # Where all paths through one weight go through another, too, rounding decides between them.
        assert not len(go) or float(stay.min()) >= float(go.max()) * (1 - 1e-5)
        before = masks
    assert total(before) == question.budget.total


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("net", "variant", "budget", "resolution"),
    one_in(6, EXACT, VARIANTS, ["global", "uniform", "erk", "dict"], ["channel", "spatial"]),
)
def test_masks_are_those_of_the_naive_loop(net: str, variant: str, budget: str, resolution: str) -> None:
    question = asked(net)
    if budget == "dict":
        name = list(question.weights)[1]
        question = asked(net, budget={name: 0.3})
    elif budget != "global":
        question = asked(net, budget=budget)
    masks = found_by(question, variant, resolution)
    assert total(masks) == question.budget.total
    assert agree(masks, naive(question, variant, resolution))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("net", "variant", "granularity"),
    one_in(2, ["conv_chain", "residual"], VARIANTS, [KERNEL, CHANNEL, NM(2, 4)]),
)
def test_coarser_granularities(net: str, variant: str, granularity: Granularity) -> None:
    question = asked(net, sparsity=0.6, granularity=granularity)
    masks = found_by(question, variant, "channel")
    assert agree(masks, naive(question, variant, "channel"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_that_stay_as_they_are_and_weights_pruned_before(variant: str) -> None:
    whole = asked("residual")
    weights = dict(list(whole.weights.items())[::2])
    start = {name: torch.rand(weight.shape) < 0.7 for name, weight in weights.items()}
    question = problem(whole.model, 0.8, graph=whole.graph, only=weights, masks=start)
    masks = found_by(question, variant, "channel")
    assert is_subset(masks, start)
    assert total(masks) == question.budget.total
    assert agree(masks, naive(question, variant, "channel"))


def padded() -> nn.Sequential:
    """On an image of one pixel: of nine taps, eight see nothing but padding."""
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_on_padding_carry_nothing(variant: str) -> None:
    torch.manual_seed(0)
    model = padded()
    gm = capture(model, torch.zeros(1, 4, 1, 1))
    question = problem(gm, 0.95, graph=lower(gm))
    masks = found_by(question, variant, "channel")
    for mask in masks.values():
        assert int(mask.sum()) == int(mask[:, :, 1, 1].sum()) > 0
    assert agree(masks, naive(question, variant, "channel"))


def test_a_layer_applied_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.b(self.a(x)).relu()))

    torch.manual_seed(0)
    gm = capture(Twice(), torch.zeros(1, 3))
    question = problem(gm, 0.7, graph=lower(gm))
    assert circuit(question.graph, pool="mean", products="mean") is not None
    for variant in VARIANTS:
        assert agree(found_by(question, variant, "channel"), naive(question, variant, "channel")), variant


def test_slopes_beyond_the_range_of_the_circuit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Circuit.run

    def lost(self: Circuit, counts: Mapping[str, Tensor]) -> Pass:
        found = run(self, counts)
        return found._replace(slope=[torch.full_like(slope, math.nan) for slope in found.slope])

    monkeypatch.setattr(Circuit, "run", lost)
    question = asked("residual")
    assert agree(found_by(question, "synflow", "channel"), naive(question, "synflow", "channel"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inverted_scores(variant: str) -> None:
    question = asked("residual", invert=True)
    assert agree(found_by(question, variant, "channel"), naive(question, variant, "channel"))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("variant", VARIANTS)
def test_flow_that_float32_cannot_hold(variant: str) -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.mul_(1e-3)  # R is about 1e-60
    gm = capture(deep, torch.zeros(2, 8))
    question = problem(gm, 0.6, graph=lower(gm))
    assert agree(found_by(question, variant, "channel"), naive(question, variant, "channel"))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "factor"), one_in(2, VARIANTS, [1e-4, 1e4]))
def test_flow_beyond_every_float(variant: str, factor: float) -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(120)))
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.mul_(factor)  # R is about 1e470, or 1e-500
    gm = capture(deep, torch.zeros(2, 8))
    question = problem(gm, 0.5, graph=lower(gm))
    masks = found_by(question, variant, "channel")
    assert total(masks) == question.budget.total
    for mask in masks.values():
        assert bool(mask.any()) or variant in ("linear", "log")
    assert circuit(question.graph, pool="mean", products="mean") is not None


def test_weights_that_are_not_finite() -> None:
    question = asked("conv_chain")
    next(iter(question.weights.values()))[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"synflow: scores of .* are not finite"):
        found_by(question, "synflow", "channel")


def test_no_path_at_all() -> None:
    # Only ties are left: the first weights stay.
    question = asked("conv_chain")
    with torch.no_grad():
        for weight in question.weights.values():
            weight.zero_()
    masks = found_by(question, "synflow", "channel")
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert int(flat[: question.budget.total].sum()) == question.budget.total == total(masks)
