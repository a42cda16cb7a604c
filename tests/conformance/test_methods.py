"""Every method on every tiny network, through the front door: what a newcomer has to meet."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

import fxprune
from fxprune import methods
from fxprune.sparsity.budget import count

SPARSITY = 0.6
FEW = {"rounds": 5, "steps": 3}  # enough to have run the loop
PAIRS = one_in(20, methods.names(), NETS)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # tiny networks collapse, and say so


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All floating-point tensors in a network's output, whatever its structure."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def loss_fn(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Fits any output."""
    return torch.stack([(part - 1).square().mean() for part in tensors(output)]).sum()


def build(net: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return NETS[net]()


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def apply(model: nn.Module, inputs: Any, method: str, sparsity: float = SPARSITY, **options: Any) -> Any:
    for name, few in FEW.items():
        if name in methods.options(method):
            options.setdefault(name, few)
    if "data" in methods.get(method).needs:
        options |= {"data": (inputs, torch.zeros(1)), "loss_fn": loss_fn}
    return fxprune.apply(model, method, sparsity, example_inputs=inputs, progress=False, **options)


@functools.cache
def dense_shapes(net: str) -> dict[str, torch.Size]:
    """Prunable parameters and their shapes, by the masks of a method that prunes nothing."""
    model, inputs = build(net)
    return {name: mask.shape for name, mask in fxprune.masks(apply(model, inputs, "magnitude", 0.0)).items()}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that pruning a copy of it must not change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def assert_trains_and_stays_pruned(pruned: nn.Module, inputs: Any, masks: dict[str, torch.Tensor]) -> None:
    """One step with momentum and weight decay changes something, but no pruned weight."""
    pruned.train()
    parameters = [p for p in pruned.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    loss_fn(call(pruned, inputs), torch.zeros(1)).backward()
    optimiser.step()
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    weights = dict(pruned.named_parameters())
    for name, mask in masks.items():
        assert not weights[name][~mask].any(), f"{name} revived"


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("method", "net"), PAIRS)
def test_budget_masks_the_callers_model_and_training(method: str, net: str) -> None:
    model, inputs = build(net)
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    pruned = apply(model, inputs, method)
    assert same(snapshot(model), before), "the caller's model was changed"

    masks = fxprune.masks(pruned)
    assert {name: mask.shape for name, mask in masks.items()} == dense_shapes(net)
    assert all(mask.dtype == torch.bool for mask in masks.values())
    size = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == count(size, 1 - SPARSITY)
    parameters = dict(model.named_parameters())
    assert all(masks[name].shape == parameters[name].shape for name in masks)
    assert_trains_and_stays_pruned(pruned, inputs, masks)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("method", "net"), one_in(40, methods.names(), NETS))
def test_the_seed_decides(method: str, net: str) -> None:
    model, inputs = build(net)
    first = fxprune.masks(apply(model, inputs, method, seed=3))
    torch.manual_seed(99)
    second = fxprune.masks(apply(copy.deepcopy(model), inputs, method, seed=3))
    assert same(first, second)


@pytest.mark.parametrize(("method", "budget"), one_in(2, methods.names(), ["uniform", "erk", {"*": 0.5}]))
def test_every_method_meets_every_budget(method: str, budget: Any) -> None:
    net = next(iter(NETS))
    model, inputs = build(net)
    masks = fxprune.masks(apply(model, inputs, method, 0.5, budget=budget))
    size = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(size / 2, abs=len(masks) / 2)
    if not isinstance(budget, str) or budget == "uniform":
        assert all(abs(int(mask.sum()) - mask.numel() / 2) <= 1 for mask in masks.values())


@pytest.mark.parametrize(
    ("method", "granularity", "schedule"),
    one_in(3, methods.names(), ["kernel", "nm(2,4)", "block(2,2)"], ["linear(3)", "cubic(4)"]),
)
def test_every_method_meets_every_granularity_and_schedule(
    method: str, granularity: str, schedule: str
) -> None:
    net = next(iter(NETS))
    model, inputs = build(net)
    masks = fxprune.masks(apply(model, inputs, method, 0.7, granularity=granularity, schedule=schedule))
    size = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert 0 < kept <= count(size, 1 - 0.7)
    if granularity == "nm(2,4)":
        assert kept == count(size, 1 - 0.7)


@pytest.mark.parametrize("method", methods.names())
def test_nothing_asked_nothing_pruned(method: str) -> None:
    for net in list(NETS)[:3]:
        model, inputs = build(net)
        assert all(bool(mask.all()) for mask in fxprune.masks(apply(model, inputs, method, 0.0)).values())


@pytest.mark.parametrize("method", methods.names())
def test_pruning_again_only_removes(method: str) -> None:
    model, inputs = build(next(iter(NETS)))
    first = apply(model, inputs, method, 0.4)
    second = apply(first, inputs, method, 0.7)
    before, after = fxprune.masks(first), fxprune.masks(second)
    assert all(not bool((after[name] & ~before[name]).any()) for name in after)
    size = sum(mask.numel() for mask in after.values())
    assert sum(int(mask.sum()) for mask in after.values()) == count(size, 1 - 0.7)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", methods.names())
def test_data_is_asked_for_before_any_work(method: str) -> None:
    model, inputs = build(next(iter(NETS)))
    if "data" in methods.get(method).needs:
        with pytest.raises(ValueError, match=rf"method '{method}' needs data=\.\.\."):
            fxprune.apply(model, method, 0.5, example_inputs=inputs, progress=False)
    else:
        assert fxprune.masks(fxprune.apply(model, method, 0.5, example_inputs=inputs, progress=False))
