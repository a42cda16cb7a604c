"""The pruner in a loop: what it does to weights, optimisers, compiled code and other processes."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scoring.processes import together
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.methods import get
from fxprune.sparsity.budget import count
from fxprune.training import Pruner, TrainingMethod
from fxprune.training.methods import METHODS, options
from training import nets
from training.nets import made

SIZE = 6 * 16 + 16 * 12 + 12 * 3

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
}


def raw_zero(pruner: Pruner) -> bool:
    """Whether every pruned weight is zero in storage."""
    return all(
        bool((pruner.model.get_parameter(name)[~mask] == 0).all()) for name, mask in pruner.masks.items()
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", ["gmp", "set"])
def test_pruned_weights_and_their_state_are_zero(kind: str, method: str) -> None:
    pruner = made(method, 0.8, **({"frequency": 2, "stop": 0.9} if method == "set" else {}))
    optimizer = OPTIMIZERS[kind](pruner.model.parameters())
    for step in range(1, 7):
        nets.train_step(pruner.model, optimizer, step)
        pruner.step(step)
        assert raw_zero(pruner), "at once"
    nets.train_step(pruner.model, optimizer, 7)
    assert raw_zero(pruner)
    assert pruner.sparsity == 1 - count(SIZE, 1 - 0.8) / SIZE
    for name, mask in pruner.masks.items():
        for value in optimizer.state[pruner.model.get_parameter(name)].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert (value[~mask] == 0).all()
    fxprune.verify(pruner.model)


def test_the_callers_model_and_random_state_are_left_alone() -> None:
    model = nets.mlp()
    before = nets.digest(model)
    state = torch.get_rng_state()
    pruner = Pruner(model, "gmp", 0.5, total=1, example_inputs=nets.X)
    pruner.step(1)
    assert nets.digest(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(pruner.model, torch.fx.GraphModule)


@pytest.mark.parametrize("returns", ["graph", "module", "inplace"])
def test_what_is_returned(returns: Any) -> None:
    model = nets.mlp()
    parameters = list(model.parameters())
    pruner = Pruner(model, "gmp", 0.5, total=1, example_inputs=nets.X, returns=returns)
    pruner.step(1)
    assert isinstance(pruner.model, nn.Sequential) == (returns != "graph")
    assert (pruner.model is model) == (returns == "inplace")
    assert (fxprune.masks(model) != {}) == (returns == "inplace")
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert raw_zero(pruner)
    fxprune.verify(pruner.model)


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_cubic_schedule_in_numbers() -> None:
    pruner = made("gmp", 0.9, total=20, begin=2, end=12, frequency=5)
    at = {}
    for step in range(1, 21):
        pruner.step(step)
        at[step] = pruner.sparsity
    assert at[1] == at[6] == 0
    assert at[7] == at[11] == 1 - count(SIZE, 1 - 0.7875) / SIZE
    assert at[12] == at[20] == 1 - count(SIZE, 1 - 0.9) / SIZE
    assert [event.at for event in pruner.history] == [2, 7, 12]
    late = made("gmp", 0.9, total=20, begin=2, end=12, frequency=5)
    late.step(13)
    assert late.sparsity == at[12], "what was due is caught up"


def test_initial_sparsity_other_schedules_and_criteria() -> None:
    pruner = made("gmp", 0.8, total=10, begin=1, initial=0.4, schedule="linear")
    pruner.step(1)
    assert pruner.sparsity == pytest.approx(0.4, abs=1 / SIZE)
    data = nets.batch(0)
    snip = made("gmp", 0.8, total=2, criterion="snip", data=data, schedule="oneshot")
    snip.step(1)
    assert snip.sparsity == 1 - count(SIZE, 1 - 0.8) / SIZE
    applied = fxprune.apply(nets.mlp(), "snip", 0.8, example_inputs=nets.X, data=data)
    for name, mask in fxprune.masks(applied).items():
        assert torch.equal(snip.masks[name], mask), "one shot at the start is apply"
    random = made("gmp", 0.5, total=1, criterion=get("random"))
    random.step(1)
    assert random.sparsity == 0.5


def test_budgets_granularities_exclusions() -> None:
    uniform = made("gmp", 0.75, total=4, budget="uniform")
    for step in range(1, 5):
        uniform.step(step)
        densities = {name: float(mask.float().mean()) for name, mask in uniform.masks.items()}
        assert max(densities.values()) - min(densities.values()) < 0.05
    assert set(densities.values()) == {0.25}
    pattern = made("gmp", 0.5, total=2, granularity="nm(2,4)", exclude="4")
    pattern.step(2)
    assert set(pattern.masks) == {"0.weight", "2.weight"}
    assert pattern.masks["2.weight"].view(-1, 4).sum(1).max() == 2


def test_imp_as_a_method() -> None:
    pruner = made("imp", total=3)
    for level in range(1, 4):
        pruner.step(level)
        assert round(SIZE * (1 - pruner.sparsity)) == pytest.approx(SIZE * 0.8**level, abs=1)


def test_a_model_pruned_before_stays_so() -> None:
    start = fxprune.apply(nets.mlp(), "magnitude", 0.5, example_inputs=nets.X)
    before = fxprune.masks(start)
    pruner = Pruner(start, "gmp", 0.8, total=4)
    for step in range(1, 5):
        pruner.step(step)
        assert pruner.sparsity >= 0.5
    assert all(bool((before[name] | ~mask).all()) for name, mask in pruner.masks.items())
    assert pruner.sparsity == pytest.approx(0.8, abs=1 / SIZE)


def test_collapse_is_told() -> None:
    pruner = made("gmp", 0.9, total=1, budget={"4": 1.0})
    with pytest.warns(UserWarning, match=r"layer collapse.*'4\.weight'"):
        pruner.step(1)


def test_dense_values_come_back() -> None:
    pruner = made("set", 0.5, total=40, frequency=1, drop=0.5, grown="dense")
    values = {name: nets.mlp().get_parameter(name).detach().clone() for name in pruner.masks}
    for step in range(1, 8):
        pruner.step(step)  # nothing trains: whatever is there has its first value
        for name, mask in pruner.masks.items():
            assert torch.equal(pruner.model.get_parameter(name), values[name] * mask)


def test_state_goes_on_elsewhere() -> None:
    first = made("set", 0.6, total=20, frequency=2, grown="dense", rewind=3)
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.1)
    for step in range(1, 5):
        nets.train_step(first.model, optimizer, step)
        first.step(step)
    second = made("set", 0.6, total=20, frequency=2, grown="dense", rewind=3)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(5, 9):
        for pruner in (first, second):
            nets.train_step(pruner.model, torch.optim.SGD(pruner.model.parameters(), lr=0.1), step)
            pruner.step(step)
    assert nets.digest(first.model) == nets.digest(second.model)
    assert first.history == second.history
    first.reinitialize("rewind:3")
    second.reinitialize("rewind:3")
    assert nets.digest(first.model) == nets.digest(second.model)
    with pytest.raises(ValueError, match="total=20"):
        made("set", 0.6, total=30).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="not the state"):
        second.load_state_dict({})


@pytest.mark.slow
def test_a_mask_update_does_not_recompile() -> None:
    torch._dynamo.reset()
    pruner = made("rigl", 0.6, total=12, frequency=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pruner.model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    for step in range(1, 9):
        nets.train_step(compiled, optimizer, step)
        pruner.step(step, lambda: nets.loss_of(compiled, 0))
        assert raw_zero(pruner)
    assert len(pruner.history) == 5
    assert counter.frame_count == 1


def on_each_rank(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in ("asni", "set", "rigl"):
        pruner = made(method, 0.6, **({} if method == "asni" else {"frequency": 1}))
        parallel = DistributedDataParallel(pruner.model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
        for step in range(1, 5):
            nets.train_step(parallel, optimizer, 10 * step + rank)
            pruner.step(step, lambda step=step, pruner=pruner: nets.loss_of(pruner.model, 10 * step + rank))
        found[method] = pruner.masks, pruner.history
    found["resumed"] = resumed_together(rank, folder)
    found["sharded"] = sharded()
    found["scored"] = scored_together([nets.batch(rank)]).masks
    if rank:
        with torch.no_grad():
            pruner.model.get_parameter("2.weight").neg_().add_(1)
    pruner = Pruner(pruner.model, "gmp", 0.9, total=1)
    try:
        pruner.step(1)
    except RuntimeError as error:
        found["error"] = str(error)
    dist.barrier()
    return found


def resumed_together(rank: int, folder: str) -> tuple[int, bool]:
    """Step to go on from when one process died before its last checkpoint; whether that went well."""

    def run(until: int) -> tuple[int, Pruner]:
        pruner = made("gmp", 0.6, checkpoint_dir=folder)
        optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1, momentum=0.9)
        start = pruner.resume(optimizer=optimizer)
        for step in range(start + 1, until + 1):
            nets.train_step(DistributedDataParallel(pruner.model), optimizer, 10 * step + rank)
            pruner.step(step)
        return start, pruner

    run(3)
    _, whole = run(5)
    dist.barrier()
    if rank:
        Path(folder, "step-000000005.rank1.ckpt").unlink()
    start, again = run(5)
    return start, nets.digest(again.model) == nets.digest(whole.model)


def scored_together(data: Any) -> Pruner:
    """A pruner whose criterion has looked at data, those of this process."""
    pruner = made("gmp", 0.6, criterion="snip", data=data)
    pruner.step(6)
    return pruner


def sharded() -> list[bool]:
    """Whether a pruner of sharded parameters does as one of whole parameters."""
    pair = [made("gmp", 0.6, rewind=1), made("gmp", 0.6, rewind=1)]
    fully_shard(pair[1].model, mesh=init_device_mesh("cpu", (2,)))
    optimizers = [torch.optim.SGD(pruner.model.parameters(), lr=0.1, momentum=0.9) for pruner in pair]
    same = []

    def compare() -> None:
        for name, value in pair[0].model.named_parameters():
            other: Any = pair[1].model.get_parameter(name)
            same.append(torch.allclose(other.full_tensor(), value, atol=1e-6))
        same.extend(torch.equal(mask, pair[0].masks[name]) for name, mask in pair[1].masks.items())

    for step in range(1, 5):
        for pruner, optimizer in zip(pair, optimizers, strict=True):
            nets.train_step(pruner.model, optimizer, step)
            pruner.step(step)
        compare()
    for start in ("centroids", "original", "rewind:1"):
        for pruner in pair:
            pruner.reinitialize(start)
        compare()
    return same


@pytest.mark.slow
def test_processes_come_to_the_same_masks(tmp_path: Path) -> None:
    one, two = together(2, on_each_rank, str(tmp_path))
    for method in ("asni", "set", "rigl"):
        assert one[method][1] == two[method][1]
        for name, mask in one[method][0].items():
            assert torch.equal(mask, two[method][0][name]), (method, name)
    assert one["resumed"] == two["resumed"] == (4, True)
    both = tuple(torch.cat(parts) for parts in zip(nets.batch(0), nets.batch(1), strict=True))
    alone = scored_together([both]).masks  # one process that has seen all of the data
    for name, mask in alone.items():
        assert torch.equal(mask, one["scored"][name])
        assert torch.equal(mask, two["scored"][name])
    assert len(one["sharded"]) == 7 * (6 + 3)
    assert all(one["sharded"] + two["sharded"])
    assert "masks of ranks [1] differ" in one["error"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"method": "gmpp"}, ValueError, "did you mean 'gmp'"),
        ({"method": "snip"}, ValueError, "criterion='snip'"),
        ({"method": 3}, TypeError, "method=3"),
        ({"sparsity": None}, ValueError, "needs the sparsity"),
        ({"sparsity": 90}, ValueError, "90 percent is 0.9"),
        ({"total": 0}, ValueError, "total=0"),
        ({"total": 2.0}, TypeError, "total=2.0"),
        ({"alpha": 0.9}, TypeError, "no option 'alpha'"),
        ({"begin": 9}, ValueError, "begin=9"),
        ({"frequency": 0}, ValueError, "frequency=0"),
        ({"initial": 0.95}, ValueError, "initial=0.95"),
        ({"schedule": "steep"}, ValueError, "schedule='steep'"),
        ({"criterion": "snip"}, ValueError, "needs data"),
        ({"criterion": "snap"}, ValueError, "snap"),
        ({"returns": "copy"}, ValueError, "returns='copy'"),
        ({"rewind": -1}, ValueError, "rewind=-1"),
        ({"exclude": "nothing"}, ValueError, "nothing"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0"),
        ({"method": "set", "granularity": "kernel"}, ValueError, "granularity='kernel'"),
        ({"method": "set", "drop": 1.5}, ValueError, "drop=1.5"),
        ({"method": "set", "grown": "random"}, ValueError, "grown='random'"),
        ({"method": "rigl", "sparsity": None}, ValueError, "needs the sparsity"),
        ({"method": "imp", "rate": 0.3}, ValueError, "give one of them"),
        ({"model": 3}, TypeError, "model: expected"),
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir: got a int, expected the name of a folder"),
    ],
)
def test_refusals(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    given = {"model": nets.mlp(), "method": "gmp", "sparsity": 0.9, "total": 4, "example_inputs": nets.X}
    with pytest.raises(kind, match=words):
        Pruner(**{**given, **change})


def test_refusals_of_steps() -> None:
    pruner = made("rigl", 0.5, total=4, frequency=1)
    with pytest.raises(ValueError, match="loss=None"):
        pruner.step(1)
    with pytest.raises(ValueError, match="loss: it returned"):
        pruner.step(1, lambda: torch.ones(2))
    with pytest.raises(ValueError, match=r"does not depend on pruner\.model"):
        pruner.step(1, lambda: nets.loss_of(nets.mlp(), 1))
    gmp = made("gmp", 0.5, total=4)
    gmp.step(2)
    for at in (2, 1):
        with pytest.raises(ValueError, match=f"at={at}: step 2 is done"):
            gmp.step(at)


def test_a_method_of_ones_own() -> None:
    def update(moment: Any) -> Any:
        return {name: mask & (torch.arange(mask.shape[1]) % 2 == 0) for name, mask in moment.masks.items()}

    method = TrainingMethod("half", 0.5, lambda at: at if at == 2 else None, update)
    pruner = made(method)
    pruner.step(1)
    assert pruner.sparsity == 0
    pruner.step(2)
    assert 0.4 < pruner.sparsity < 0.6
    with pytest.raises(TypeError, match="is a TrainingMethod already"):
        made(method, 0.5)


def test_every_method_says_its_options() -> None:
    for name, factory in METHODS.items():
        doc = inspect.getdoc(factory) or ""
        assert all(f"    {option}: " in doc for option in options(name)), name
    assert options("rigl") == {"frequency": 100, "drop": 0.3, "stop": 0.75, "grown": "zero"}


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = made("gmp", 0.5, total=1)
        assert pruner.resume(generator=torch.Generator()) == 0
        pruner.step(1)
    assert not list(tmp_path.iterdir())


class Outside(nn.Module):
    """A layer, and a table of weights that no rule can prune: it is raised to a power first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.powers = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ torch.linalg.matrix_power(self.powers, 2)


def test_weights_out_of_reach_are_named_where_the_pruner_is_made() -> None:
    torch.manual_seed(0)
    text = r"50% of the 32 matrix weights cannot be pruned.*powers \(16\)"
    with pytest.warns(UserWarning, match=text) as said:
        Pruner(Outside(), "gmp", 0.5, total=1, example_inputs=torch.ones(2, 4))
    assert said[0].filename == __file__
