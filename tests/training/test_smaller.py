"""Go on training a network that was made smaller: its function, optimizer, targets and checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.sparsity.granularity import Channel
from fxprune.training import Pruner

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def made(sparsity: float = 0.75, **options: Any) -> Pruner:
    given = {"method": "gmp", "total": 4, "granularity": "channel", **options}
    return Pruner(net(), sparsity=sparsity, example_inputs=X, **given)


def train(pruner: Pruner, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    pruner.model.train()
    optimizer.zero_grad()
    pruner.model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.slow
def test_training_goes_on_from_the_same_function_with_the_same_momenta() -> None:
    """The small network and the masked one take the same steps: what is left of the weights stays equal."""
    torch.set_default_dtype(torch.float64)
    try:
        pair = []
        for _ in range(2):
            pruner = Pruner(net(), "gmp", 0.75, total=4, example_inputs=X.double(), granularity="channel")
            pair.append((pruner, torch.optim.SGD(pruner.model.parameters(), lr=1e-3, momentum=0.9)))
        (small, own), (masked, other) = pair
        for at in range(1, 5):
            train(small, own, at), train(masked, other, at)
            small.step(at), masked.step(at)
            assert small.compact(own) is small.model
            assert small.sparsity == masked.sparsity
            outputs = [pruner.model.eval()(X.double()) for pruner in (small, masked)]
            assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert small.model.get_submodule("0").weight.shape[0] < 16
    assert [event.kept for event in small.history] == [event.kept for event in masked.history]
    plain = fxprune.compact(masked.model)
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in small.model.named_parameters()
    }


@pytest.mark.thinned(3)
@pytest.mark.parametrize("of", ["weights", "params", "macs"])
def test_the_target_is_that_of_the_whole_network(of: Any) -> None:
    stepped, once = (made(granularity=Channel(of=of)) for _ in range(2))
    for at in range(1, 5):
        stepped.step(at)
        stepped.compact()
        once.step(at)
        assert stepped.sparsity == once.sparsity


@pytest.mark.slow
def test_budgets_by_layer_stay() -> None:
    small, masked = (made(budget={"0": 0.5, "*": 0.75}, granularity="weight") for _ in range(2))
    for at in range(1, 5):
        small.step(at), masked.step(at)
        small.compact()
    targets = {"0.weight": 216, "3.weight": 864, "8.weight": 60}
    assert {name: int(mask.sum()) for name, mask in masked.masks.items()} == targets
    # Weights that no path uses go too, beyond the budget.
    assert all(int(mask.sum()) <= targets[name] for name, mask in small.masks.items())
    assert masked.sparsity <= small.sparsity < masked.sparsity + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("returns", ["graph", "module"])
def test_a_killed_run_goes_on_with_the_small_network(tmp_path: Path, returns: Any) -> None:
    def run(folder: str, until: int) -> Pruner:
        pruner = made(0.8, total=6, checkpoint_dir=tmp_path / folder, returns=returns)
        optimizer = torch.optim.AdamW(pruner.model.parameters(), lr=1e-2)
        rate = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for at in range(pruner.resume(optimizer=optimizer, rate=rate) + 1, until + 1):
            train(pruner, optimizer, at)
            rate.step()
            if at in (3, 5):
                pruner.compact()  # the optimizer is known from resume
            pruner.step(at)
        return pruner

    whole = run("whole", 6)
    run("killed", 4)
    again = run("killed", 6)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    assert [event.kept for event in whole.history] == [event.kept for event in again.history]
    fxprune.save(again.model, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", net())
    assert torch.equal(loaded.eval()(X), again.model.eval()(X))


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["between", "behind"])
def test_compact_behind_step_and_behind_resume_goes_on_to_the_same_bits(tmp_path: Path, stop: str) -> None:
    """Nobody sets modes here: the network that a run goes on with is one that trains, dropout included."""

    def run(folder: str, until: int) -> Pruner:
        torch.manual_seed(0)
        given = nn.Sequential(*net()[:-1], nn.Dropout(0.5), nn.Linear(24, 10))
        pruner = Pruner(given, "gmp", 0.8, total=4, example_inputs=X, granularity="channel",
                        checkpoint_dir=tmp_path / folder)  # fmt: skip
        optimizer = torch.optim.AdamW(pruner.model.parameters(), lr=1e-2)
        start = pruner.resume(optimizer=optimizer)
        pruner.compact()
        for at in range(start + 1, until + 1):
            optimizer.zero_grad()
            pruner.model(torch.randn(4, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            pruner.step(at)
            if at < until or stop == "behind":
                pruner.compact()
        return pruner

    whole = run("whole", 4)
    run("killed", 3)
    again = run("killed", 4)
    assert all(module.training for module in again.model.modules())
    values = again.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.slow
def test_a_state_of_another_compaction_is_refused() -> None:
    first, second = made(), made()
    first.step(2)
    first.compact()
    second.step(3)
    second.compact()
    with pytest.raises(ValueError, match="compacted, and otherwise"):
        second.load_state_dict(first.state_dict())


def test_random_draws_go_on() -> None:
    pruner = made(criterion="random")
    pruner.step(1)
    pruner.compact()
    before = pruner.state_dict()["generator"].clone()
    pruner.step(2)
    assert not torch.equal(pruner.state_dict()["generator"], before)


def test_masks_stay_on_what_is_left_of_single_weights() -> None:
    pruner = made(0.9, granularity="weight")
    pruner.step(4)
    before = copy.deepcopy(pruner.model).eval()
    pruner.compact()
    assert torch.allclose(pruner.model.eval()(X), before(X), atol=1e-6)
    assert all(bool((~mask).any()) for mask in pruner.masks.values())
    assert all(not pruner.model.get_parameter(name)[~mask].any() for name, mask in pruner.masks.items())


def test_what_cannot_get_smaller_says_so() -> None:
    growing = Pruner(net(), "set", 0.5, total=2, example_inputs=X)
    with pytest.raises(ValueError, match="method 'set': its weights come back"):
        growing.compact()
    with pytest.raises(ValueError, match=r"returns='inplace': compact\(\)"):
        made(returns="inplace").compact()


def test_weights_of_earlier_steps_are_gone() -> None:
    pruner = made()
    pruner.step(4)
    pruner.compact()
    with pytest.raises(ValueError, match=r"start='original': compact\(\) made a smaller network"):
        pruner.reinitialize("original")
    pruner.remember(5)
    values = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    with torch.no_grad():
        for parameter in pruner.model.parameters():
            parameter.mul_(2)
    pruner.reinitialize("rewind:5")
    assert all(torch.equal(value, pruner.model.state_dict()[name]) for name, value in values.items())


def test_optimizers_of_something_else_are_refused_before_anything_changes() -> None:
    pruner = made()
    pruner.step(4)
    model = pruner.model
    other = torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(ValueError, match=r"^optimizers: a SGD has parameters that are not pruner\.model's"):
        pruner.compact(other)
    with pytest.raises(TypeError, match=r"^optimizers: got a str, expected those"):
        pruner.compact("adam")  # type: ignore[arg-type]
    assert pruner.model is model
