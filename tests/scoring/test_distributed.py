"""Scoring by two and four processes gives what one process gives; sharded parameters are never gathered."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from methods.problems import NO_GRAPH, problem
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fxprune import methods
from fxprune.methods import Problem, agree, as_dtensors, local_rows
from fxprune.methods.px.output_activity import output_activities
from fxprune.scoring.data import Batch
from fxprune.sparsity.budget import Budget, plan
from fxprune.sparsity.granularity import KERNEL, NM, WEIGHT, Granularity
from fxprune.sparsity.masks import Masks, kept
from fxprune.sparsity.select import select
from fxprune.sparsity.sharded import select_sharded
from scoring.processes import together

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(8) % 4
BATCHES = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 8, 2)]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("snip", {}),
    ("snip", {"average": "saliency"}),
    ("iter-snip", {"rounds": 3}),
    ("force", {"rounds": 3}),
    ("grasp", {}),
    ("grasp-it", {"rounds": 2}),
    ("prospr", {"steps": 2, "lr": 0.5}),
    ("ntk-sap", {"rounds": 2}),
    ("taylor", {}),
    ("obd", {}),
    ("wanda", {}),
    ("random", {}),
    ("magnitude", {}),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 5, 3), nn.Tanh(), *head).double()


def options_of(name: str, options: dict[str, Any], batches: int) -> dict[str, Any]:
    return options | ({"batches": batches} if "batches" in methods.options(name) else {})


def share(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return BATCHES[rank :: dist.get_world_size()]


def in_one_process(name: str, options: dict[str, Any]) -> Masks:
    if name == "prospr":  # every step sees the mean over the batches, as one large batch gives it
        return methods.get(name, **options).find(problem(net(), 0.6, data=(X, Y)))
    return methods.get(name, **options_of(name, options, 4)).find(problem(net(), 0.6, data=BATCHES))


def score(rank: int) -> list[Masks]:
    found = []
    for name, options in METHODS:
        data: Any = share(rank)
        if name == "prospr":
            data = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
            asked = problem(net(), 0.6, data=data, group=dist.group.WORLD)
            found.append(methods.get(name, **options).find(asked))
            continue
        asked = problem(net(), 0.6, data=data, group=dist.group.WORLD)
        found.append(methods.get(name, **options_of(name, options, len(data))).find(asked))
    return found


def same(left: Masks, right: Masks) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module", params=[pytest.param(number, marks=pytest.mark.slow) for number in (2, 4)])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return what every process of 2, and of 4, found."""
    return together(request.param, everything)


@pytest.mark.slow
def test_any_number_of_processes_gives_the_masks_of_one(results: list[dict[str, Any]]) -> None:
    for (name, options), *found in zip(METHODS, *(result["scored"] for result in results), strict=True):
        expected = in_one_process(name, options)
        assert all(same(masks, expected) for masks in found), f"{name} {options}"


def disagree(rank: int) -> list[str]:
    """The errors when the last process differs: in its masks, and in its weights."""
    last = rank == dist.get_world_size() - 1
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(2 if last else 1)
    errors = []
    for attempt in (
        lambda: agree({"a": torch.tensor([True, False]), "b": torch.tensor([last])}, dist.group.WORLD),
        lambda: methods.get("magnitude").find(problem(model, 0.6, group=dist.group.WORLD)),
    ):
        with pytest.raises(RuntimeError) as caught:
            attempt()
        errors.append(str(caught.value))
    return errors


def test_masks_that_differ_are_an_error_on_every_process(results: list[dict[str, Any]]) -> None:
    words = f"masks of ranks [{len(results) - 1}] differ from those of rank 0"
    assert all(words in error for result in results for error in result["disagreed"])


def die(rank: int) -> Masks | None:
    if rank == 1:
        os._exit(1)
    return methods.get("snip").find(problem(net(), 0.6, data=BATCHES, group=dist.group.WORLD))


def test_a_process_that_dies_ends_the_others() -> None:
    survivor, dead = together(2, die, timeout=10.0)
    assert dead is None
    assert isinstance(survivor, RuntimeError)


def wrapped(rank: int) -> tuple[Masks, list[bool]]:
    model = DistributedDataParallel(net())
    asked = problem(model.module, 0.6, data=share(rank), group=dist.group.WORLD)
    masks = methods.get("snip", batches=len(share(rank))).find(asked)
    untouched = [p.grad is None for p in model.parameters()]
    nn.functional.cross_entropy(model(X), Y).backward()  # the wrapper still works
    return masks, untouched


def test_modules_in_a_ddp_wrapper(results: list[dict[str, Any]]) -> None:
    expected = in_one_process("snip", {})
    for masks, untouched in (result["wrapped"] for result in results):
        assert same(masks, expected)
        assert all(untouched)


# -- sharded ---------------------------------------------------------------------------------------------
def sharded_problem(model: nn.Module, **fields: Any) -> Problem:
    """As whoever has a ``fully_shard``-ed model makes it."""
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    rows, group = local_rows(model, names)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    return Problem(
        model=model, graph=NO_GRAPH, weights=rows, budget=plan("global", 0.6, shapes), shards=group,
        masks={name: torch.ones_like(row, dtype=torch.bool) for name, row in rows.items()}, **fields,
    )  # fmt: skip


SHARDED: list[tuple[str, dict[str, Any]]] = [
    ("snip", {}), ("iter-snip", {"rounds": 3}), ("force", {"rounds": 3}), ("magnitude", {})
]  # fmt: skip


def score_sharded(rank: int) -> dict[str, Any]:
    model = net()
    for module in (model[0], model[2], model):
        fully_shard(module)
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    result: dict[str, Any] = {"masks": []}
    for name, options in SHARDED:
        asked = sharded_problem(model, data=share(rank))
        local = methods.get(name, **options_of(name, options, len(share(rank)))).find(asked)
        whole = as_dtensors(local, model)
        result["masks"].append({key: mask.full_tensor() for key, mask in whole.items()})
    result["same"] = all(torch.equal(p.to_local(), before[name]) for name, p in model.named_parameters())
    result["gradients"] = [p.grad is None for p in model.parameters()]
    result["rows"] = [p.to_local().shape[0] for p in model.parameters()]
    try:
        methods.get("grasp").find(sharded_problem(model, data=share(rank)))
    except ValueError as error:
        result["grasp"] = str(error)
    nn.functional.cross_entropy(model(X), Y).backward()
    return result


def test_sharded_parameters(results: list[dict[str, Any]]) -> None:
    expected = [in_one_process(name, options) for name, options in SHARDED]
    found = [result["sharded"] for result in results]
    for result in found:
        assert all(same(masks, one) for masks, one in zip(result["masks"], expected, strict=True))
        assert result["same"]
        assert all(result["gradients"])
        assert "needs second derivatives" in result["grasp"]
    rows = zip(*(result["rows"] for result in found), strict=True)
    assert [sum(own) for own in rows] == [5, 5, 5, 5, 4, 4]


SHAPES = {"a": (7, 8), "b": (3, 4, 2), "c": (1, 5)}
CASES: list[tuple[Granularity, dict[str, int] | None]] = [
    (WEIGHT, None),
    (WEIGHT, {"a": 20, "b": 0, "c": 3}),
    (NM(2, 4), None),
    (NM(1, 4), {"a": 9, "b": 3, "c": 1}),
]


def tied_scores(seed: int) -> tuple[dict[str, torch.Tensor], Masks]:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randint(-2, 3, shape, generator=generator).float() for name, shape in SHAPES.items()
    }
    return scores, {name: torch.rand(shape, generator=generator) < 0.9 for name, shape in SHAPES.items()}


def budget_of(layers: dict[str, int] | None) -> Budget:
    total = 25 if layers is None else sum(layers.values())
    return Budget(total, {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}, layers)


def select_rows(rank: int) -> list[Any]:
    world = dist.get_world_size()

    def rows(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        size = {name: -(-len(x) // world) for name, x in whole.items()}
        return {name: x[rank * size[name] : (rank + 1) * size[name]] for name, x in whole.items()}

    def find(seed: int, budget: Budget, granularity: Granularity, bad: float = 1.0) -> Masks:
        scores, within = tied_scores(seed)
        scores["b"][0, 0, 0] *= bad
        return select_sharded(
            rows(scores), budget, dist.group.WORLD, within=rows(within), granularity=granularity
        )

    found: list[Any] = [find(seed, budget_of(layers), how) for seed in range(5) for how, layers in CASES]
    for case in (
        (0, budget_of(None), WEIGHT, float("nan")),
        (0, budget_of(None), KERNEL),
        (0, Budget(900, budget_of(None).sizes), WEIGHT),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            find(*case)
        found.append(str(caught.value))
    return found


def test_the_search_over_shards_finds_what_selection_finds(results: list[dict[str, Any]]) -> None:
    cases = [(seed, *case) for seed in range(5) for case in CASES]
    parts = [result["selected"] for result in results]
    for (seed, granularity, layers), *found in zip(cases, *(part[:20] for part in parts), strict=True):
        scores, within = tied_scores(seed)
        expected = select(scores, budget_of(layers), within=within, granularity=granularity)
        whole = {name: torch.cat([masks[name] for masks in found]) for name in SHAPES}
        assert same(whole, expected), f"{granularity} {layers}: {kept(whole)}"
    for part in parts:
        assert "scores of 'b' are not finite" in part[20]
        assert "may lie in several shards" in part[21]
        assert "900 are asked for" in part[22]


def activity(rank: int | None) -> torch.Tensor:
    """Return what PX reads off data whose every batch is larger than the last by far; of all, for None."""
    batches = [Batch(1e6**place * x, y) for place, (x, y) in enumerate(BATCHES)]
    group = None if rank is None else dist.group.WORLD
    asked = problem(net(), 0.6, group=group)
    own = batches if rank is None else batches[rank :: dist.get_world_size()]
    (found,) = output_activities(asked, asked.masks, own)
    return found.values * 2.0**found.power


def test_processes_add_activity_of_any_size(results: list[dict[str, Any]]) -> None:
    expected = activity(None)
    for result in results:
        assert torch.allclose(result["activity"] * len(results), expected)


def everything(rank: int) -> dict[str, Any]:
    return {
        "activity": activity(rank),
        "scored": score(rank),
        "disagreed": disagree(rank),
        "wrapped": wrapped(rank),
        "sharded": score_sharded(rank),
        "selected": select_rows(rank),
    }
