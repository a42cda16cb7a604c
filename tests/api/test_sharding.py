"""Models that ``fully_shard`` has split, or that DDP wraps, pruned by 2 and 4 processes as by one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scoring.processes import together
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.methods import Problem, Scores, from_scores
from fxprune.sparsity.masks import Masks

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(8) % 3
BATCHES = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 8, 2)]


class Standardised(nn.Conv2d):
    """A convolution that moves the zeros of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.weight - mean, self.bias, padding=1)


class Mixer(nn.Module):
    """Reads the weight of a layer that it never calls, and has an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.read.weight).tanh()
        return x + self.attention(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    """Its last layer has fewer rows than there may be processes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.std = Standardised(7, 6, 3)
        self.mixer = Mixer()
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.std(self.norm(self.stem(x)).relu()).tanh()
        return self.head(self.mixer(x.flatten(2).transpose(1, 2)).mean(1))


def sharded(seed: int = 0, mesh: Any = None) -> Net:
    """As users do it: the parts, two of them in one group, and the root."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    model = Net(seed)
    fully_shard(model.stem, mesh=mesh)
    fully_shard([model.std, model.head], mesh=mesh)
    fully_shard(model.mixer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def _squares(problem: Problem, masks: Masks) -> Scores:
    return {name: weight.square() for name, weight in problem.weights.items()}


LARGEST = fxprune.Method("largest", from_scores(_squares), shards="rows")
CASES: list[tuple[Any, dict[str, Any]]] = [
    ("magnitude", {}),
    ("magnitude", {"budget": "erk", "exclude": "stem"}),
    ("magnitude", {"granularity": "nm(1,2)"}),
    ("magnitude", {"invert": True, "shuffle": "global"}),
    (LARGEST, {}),
    ("random", {}),
    ("random", {"budget": {"mixer.*": 0.8, "stem": 0.3}, "shuffle": "layer"}),
    ("snip", {}),
    ("snip", {"budget": "uniform", "micro_batch": 1, "mode": "eval"}),
    ("iter-snip", {"rounds": 3}),
    ("force", {"rounds": 3, "schedule": "linear"}),
    ("npb", {"exclude": ["head"]}),
    ("dpai", {"steps": 5}),
    ("dpai", {"steps": 5, "granularity": "kernel"}),
    ("balance", {"steps": 12, "shuffle": "layer"}),
]
ASKED: dict[str, Any] = {"sparsity": 0.6, "example_inputs": X, "progress": False}


def options_of(method: Any, options: dict[str, Any], number: int) -> dict[str, Any]:
    batches = {"batches": number} if method in ("snip", "iter-snip", "force") else {}
    return ASKED | options | batches


def alone(method: Any, options: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    asked = options_of(method, options, 4) | {"returns": "module"}
    return fxprune.apply(model or Net(), method, data=BATCHES, **asked)


def shared(method: Any, options: dict[str, Any], model: nn.Module) -> nn.Module:
    """With this process's share of the data."""
    share = BATCHES[dist.get_rank() :: dist.get_world_size()]
    asked = options_of(method, options, len(share)) | {"returns": "inplace"}
    return fxprune.apply(model, method, data=share, **asked)


def same(left: Masks, right: Masks) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def everything(rank: int, folder: str) -> dict[str, Any]:
    found = {"masks": [fxprune.masks(shared(*case, sharded())) for case in CASES]}
    return found | {
        "hygiene": hygiene(),
        "again": again(),
        "replicated": replicated(),
        "trained": trained(rank),
        "files": files(rank, folder),
        "refused": refused(),
        "wrapped": wrapped(),
        "disagreed": disagreed(rank),
    }


@pytest.fixture(scope="module", params=[pytest.param(number, marks=pytest.mark.slow) for number in (2, 4)])
def results(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("files"))
    found = together(request.param, everything, folder, timeout=120.0)
    errors = [result for result in found if not isinstance(result, dict)]
    assert not errors, errors
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sparsity=0.6. more than the 0.5 of 1.2")
def test_masks_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    for (method, options), *found in zip(CASES, *(result["masks"] for result in results), strict=True):
        expected = fxprune.masks(alone(method, options))
        assert all(same(masks, expected) for masks in found), f"{method} {options}"


# -- what is left alone -----------------------------------------------------------------------------------
def hygiene() -> dict[str, Any]:
    """Return what an apply changes besides the pruned weights, and what it gathers."""
    model = sharded()
    model.eval()
    model.norm.train()
    model(X)  # the root's parameters are whole from now on
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dice = torch.get_rng_state()
    gathered: list[torch.dtype] = []
    original = DTensor.full_tensor

    def full_tensor(tensor: DTensor, **options: Any) -> torch.Tensor:
        gathered.append(tensor.dtype)
        return original(tensor, **options)

    DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
    try:
        result = shared("snip", {}, model)
        shared("magnitude", {}, sharded())
    finally:
        DTensor.full_tensor = original  # type: ignore[method-assign]
    after = model.state_dict()
    rows = {name: value.to_local() for name, value in after.items() if isinstance(value, DTensor)}
    return {
        "itself": result is model,
        "split": [isinstance(p, DTensor) and p.grad is None for p in model.parameters()],
        "units": [isinstance(m, FSDPModule) for m in (model, model.stem, model.std, model.head, model.mixer)],
        "values": [bool(((own == before[name].to_local()) | (own == 0)).all()) for name, own in rows.items()],
        "buffers": [torch.equal(value, before[name]) for name, value in after.items()
                    if name in before and name not in rows],
        "modes": [module.training for module in (model, model.norm, model.stem)],
        "dice": torch.equal(dice, torch.get_rng_state()),
        "gathered": set(gathered),
    }  # fmt: skip


def test_the_model_is_pruned_itself_and_nothing_else_happens(results: list[dict[str, Any]]) -> None:
    for found in (result["hygiene"] for result in results):
        assert found["itself"]
        assert all(found["split"] + found["units"] + found["values"] + found["buffers"])
        assert found["modes"] == [False, True, False]
        assert found["dice"]
        assert found["gathered"] == {torch.bool}  # masks, never weights


def again() -> list[Masks]:
    """Pruned, split and pruned again; and split, pruned and pruned again."""
    first = alone("magnitude", {"exclude": "head"})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (first.stem, first.mixer, first):
        fully_shard(part, mesh=mesh)
    second = shared("magnitude", {"exclude": "head"}, sharded())
    return [fxprune.masks(shared("snip", {"sparsity": 0.8}, model)) for model in (first, second)]


def test_pruning_again(results: list[dict[str, Any]]) -> None:
    first = alone("magnitude", {"exclude": "head"})
    expected = fxprune.masks(alone("snip", {"sparsity": 0.8}, first))
    for result in results:
        assert all(same(masks, expected) for masks in result["again"])


def replicated() -> list[Masks]:
    """Split over two, in two copies (HSDP), where there are four processes."""
    if dist.get_world_size() < 4:
        return []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows"))
    return [fxprune.masks(shared(*case, sharded(mesh=mesh))) for case in (("random", {}), ("snip", {}))]


def test_split_and_replicated(results: list[dict[str, Any]]) -> None:
    expected = [fxprune.masks(alone(*case)) for case in (("random", {}), ("snip", {}))]
    for result in results:
        assert len(result["replicated"]) == (2 if len(results) == 4 else 0)
        assert all(same(a, b) for a, b in zip(result["replicated"], expected, strict=False))


# -- afterwards -------------------------------------------------------------------------------------------
def train(model: nn.Module, rows: slice) -> list[dict[str, torch.Tensor]]:
    """The gradients of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.eval()  # batch statistics would differ
    gradients = []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X[rows]), Y[rows]).backward()
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(rank: int) -> dict[str, Any]:
    model = shared("snip", {}, sharded())
    size = len(X) // dist.get_world_size()
    gradients = train(model, slice(rank * size, (rank + 1) * size))
    fxprune.verify(model)
    model.train()
    return {
        "values": {name: whole(p.detach()) for name, p in model.named_parameters()},
        "pruned": [bool((gradient[name][~mask] == 0).all())
                   for name, mask in fxprune.masks(model).items() for gradient in gradients],
        "report": fxprune.analyze(model, example_inputs=X).to_json(),
        "dense": fxprune.analyze(sharded(), example_inputs=X).effective_nodes,
    }  # fmt: skip


def test_training_and_reports_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    model = alone("snip", {})
    train(model, slice(None))
    report = fxprune.analyze(model, example_inputs=X).to_json()
    dense = fxprune.analyze(Net(), example_inputs=X).effective_nodes
    masks = fxprune.masks(model)
    for found in (result["trained"] for result in results):
        for name, value in model.named_parameters():
            assert torch.allclose(found["values"][name], value, rtol=0, atol=1e-12), name
        for name, mask in masks.items():
            assert bool((found["values"][name][~mask] == 0).all())
        assert all(found["pruned"])
        assert found["report"] == report
        assert found["dense"] == dense


def files(rank: int, folder: str) -> dict[str, Any]:
    """State dicts, split and whole, into models pruned otherwise; and mask files, written by all at once."""
    model = shared("snip", {}, sharded())
    other = shared("random", {}, sharded(seed=5))
    other.load_state_dict(model.state_dict())
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    fxprune.save(model, Path(folder, "masks"), form="masks")
    fxprune.save(model, Path(folder, f"ticket{rank}"), form="ticket")
    dist.barrier()
    return {
        "loaded": same(fxprune.masks(other), fxprune.masks(model)),
        "values": [torch.equal(whole(a), whole(b))
                   for a, b in zip(other.parameters(), model.parameters(), strict=True)],
        "full": full,
        "file": fxprune.load_masks(Path(folder, "masks")),
        "ticket": fxprune.load_masks(Path(folder, f"ticket{rank}")),
        "left": sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("ticket")),
    }  # fmt: skip


def test_state_dicts_and_files(results: list[dict[str, Any]]) -> None:
    expected = alone("snip", {})
    masks = fxprune.masks(expected)
    for found in (result["files"] for result in results):
        assert found["loaded"]
        assert all(found["values"])
        assert same(found["file"], masks)
        assert same(found["ticket"], masks)
        assert found["left"] == ["masks"]
    single = alone("random", {}, Net(seed=5))  # a model of one process takes what several have written
    single.load_state_dict(results[0]["files"]["full"])
    assert same(fxprune.masks(single), masks)
    assert all(torch.equal(a, b) for a, b in zip(single.parameters(), expected.parameters(), strict=True))


# -- refusals ---------------------------------------------------------------------------------------------
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"returns": "graph"}, "returns='graph': fully_shard has split the model"),
    ({"returns": "module"}, "pass returns='inplace'"),
    ({"method": "synflow"}, "method 'synflow' needs whole parameters"),
    ({"method": "grasp"}, "or take one of balance, dpai, force, iter-snip, magnitude, npb, random, snip"),
    ({"method": "snip", "average": "saliency"}, "method 'snip' needs whole parameters"),
    ({"method": "npb", "inside": "magnitude"}, "method 'npb' needs whole parameters"),
    ({"granularity": "channel"}, "granularity channel: its groups may lie in several processes"),
    ({"on_collapse": "repair"}, "on_collapse='repair' needs whole parameters"),
    ({"reinit": True}, "reinit=True: fully_shard has split the model"),
    ({"device": "cpu"}, "device='cpu': a model that fully_shard has split is scored where it is"),
]


def refused() -> list[str]:
    model = sharded()
    calls: list[Any] = []
    model.forward = lambda x: calls.append(x)  # type: ignore[assignment, method-assign]
    errors = []
    for given, _ in REFUSALS:
        asked = {"method": "magnitude", "data": BATCHES, "returns": "inplace"} | given | ASKED
        with pytest.raises(ValueError, match=r".") as caught:
            fxprune.apply(model, **asked)
        errors.append(str(caught.value))
    parts = Net()
    fully_shard(parts.mixer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for attempt in (
        lambda: fxprune.apply(parts, "magnitude", returns="inplace", **ASKED),
        lambda: fxprune.capture(model, X),
        lambda: fxprune.Pruner(model, "gmp", 0.5, total=3, example_inputs=X, returns="inplace"),
        lambda: fxprune.finalize(model),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            attempt()
        errors.append(str(caught.value))
    assert not calls
    return errors


def test_what_cannot_be_done_is_said(results: list[dict[str, Any]]) -> None:
    words = [message for _, message in REFUSALS]
    words += ["'stem.weight' has to be split over its rows", "capture it before fully_shard"]
    words += ["capture it before fully_shard", "so that it cannot be copied"]
    for result in results:
        for error, expected in zip(result["refused"], words, strict=True):
            assert expected in error
            assert "\n" not in error


# -- wrapped by DDP, and several processes that do not agree ------------------------------------------------
def wrapped() -> dict[str, Any]:
    share = BATCHES[dist.get_rank() :: dist.get_world_size()]
    asked = options_of("snip", {}, len(share))
    model = DistributedDataParallel(Net())
    graph = fxprune.apply(model, "snip", data=share, **asked)
    untouched = all(torch.equal(a, b) for a, b in zip(model.parameters(), Net().parameters(), strict=True))
    itself = shared("snip", {}, model)
    F.cross_entropy(model(X), Y).backward()
    return {
        "masks": [fxprune.masks(graph), fxprune.masks(itself)],
        "untouched": untouched,
        "itself": itself is model,
        "pruned": [bool((model.module.get_parameter(name).grad[~mask] == 0).all())
                   for name, mask in fxprune.masks(model).items()],
    }  # fmt: skip


def test_modules_in_a_ddp_wrapper(results: list[dict[str, Any]]) -> None:
    expected = fxprune.masks(alone("snip", {}))
    for found in (result["wrapped"] for result in results):
        assert all(same(masks, expected) for masks in found["masks"])
        assert found["untouched"]
        assert found["itself"]
        assert all(found["pruned"])


def disagreed(rank: int) -> list[str]:
    """The errors when the last process differs."""
    seed = int(rank == dist.get_world_size() - 1)
    errors = []
    for attempt in (
        lambda: fxprune.apply(DistributedDataParallel(Net()), "random", seed=seed, **ASKED),
        lambda: fxprune.apply(sharded(), "dpai", seed=seed, steps=5, returns="inplace", **ASKED),
    ):
        with pytest.raises(RuntimeError) as caught:
            attempt()
        errors.append(str(caught.value))
    return errors


def test_masks_that_differ_are_an_error_on_every_process(results: list[dict[str, Any]]) -> None:
    words = f"masks of ranks [{len(results) - 1}] differ from those of rank 0"
    assert all(words in error for result in results for error in result["disagreed"])


def die(rank: int, kind: str) -> Any:
    """Rank 1 is killed when the first batch is read."""

    def data() -> Iterator[Any]:
        if rank == 1:
            os._exit(1)
        yield X, Y

    model = sharded() if kind == "sharded" else DistributedDataParallel(Net())
    return fxprune.apply(model, "snip", data=data(), returns="inplace", **ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "wrapped"])
def test_a_process_that_dies_ends_the_others(kind: str) -> None:
    survivor, dead = together(2, die, kind, timeout=10.0)
    assert dead is None
    assert isinstance(survivor, RuntimeError)
