"""Pruned weights never come back: optimisers, averages, mixed precision, tied weights."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxprune.rewrite import read, set_masks, verify
from rewrite import nets

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def train(model, optimizer, steps, masks=None, **autocast):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
            loss = (model(x).float() - x.mean((2, 3))).square().mean()
        loss.backward()
        optimizer.step()
        if masks is not None:
            assert nets.raw_zero(model, masks)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dense_steps", [0, 5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fifty_steps(kind, dense_steps):
    model = nets.small_cnn()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, dense_steps)
    masks = nets.masks_for(model)
    parameters = list(model.parameters())
    set_masks(model, masks)
    train(model, optimizer, 50, masks)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    verify(model)
    for name, mask in masks.items():
        for value in optimizer.state[model.get_parameter(name)].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert (value[~mask] == 0).all(), "the state of pruned entries is cleaned"
    assert any((model.get_parameter(name)[mask] != 0).any() for name, mask in masks.items())


def test_masks_that_change_while_training():
    model = nets.small_cnn()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    for seed in range(3):
        masks = nets.masks_for(model, seed=seed)
        set_masks(model, masks)
        train(model, optimizer, 3, masks)
        verify(model)


def test_not_a_number_does_not_survive_in_pruned_storage():
    model = nets.small_cnn()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with torch.no_grad():
        model[0].weight.masked_fill_(~masks["0.weight"], float("nan"))
    optimizer.step()
    assert nets.raw_zero(model, masks)


def test_only_its_own_parameters():
    """A step of one optimiser leaves other models alone, and dead models leave nothing behind."""
    one, other = nets.small_cnn(), nets.small_cnn()
    set_masks(one, nets.masks_for(one))
    set_masks(other, nets.masks_for(other))
    with torch.no_grad():
        other[0].weight.add_(1.0)
    train(one, OPTIMIZERS["sgd"](one.parameters()), 1)
    assert not nets.raw_zero(other, read(other))


@pytest.mark.parametrize("buffers", [True, False])
def test_averages(buffers):
    model = nets.small_cnn()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    early = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    train(model, optimizer, 2, masks)
    late = AveragedModel(model)  # torch's plain average of buffers subtracts them, which bool refuses
    for _ in range(3):
        train(model, optimizer, 1, masks)
        for average in (early, late):
            average.update_parameters(model)
    for average in (early, late):
        verify(average)
        assert all(torch.equal(read(average)[name], mask) for name, mask in masks.items())
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 8, 8)], early)
    verify(early)


def test_mixed_precision():
    model = nets.small_cnn()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    train(model, OPTIMIZERS["adamw"](model.parameters()), 3, masks, autocast=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3, 8, 8)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert nets.raw_zero(model, masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model = nets.small_cnn()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    model.to(dtype)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, dtype=dtype)).square().mean().backward()
        optimizer.step()
        assert nets.raw_zero(model, masks)
    verify(model)


@pytest.mark.slow
def test_compiled_training_equals_eager_and_sees_mask_changes():
    torch._dynamo.reset()
    eager = nets.small_cnn()
    set_masks(eager, nets.masks_for(eager))
    twin = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for seed in (1, 2):
        for model, run in ((eager, eager), (twin, compiled)):
            masks = nets.masks_for(eager, seed=seed)
            set_masks(model, masks)
            train(run, OPTIMIZERS["sgd"](run.parameters()), 3)
        for name, value in eager.named_parameters():
            assert torch.allclose(value, twin.get_parameter(name), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_masks_set_on_a_model_that_was_compiled_dense():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 3), nets.Attention())
    model[1] = nn.Linear(3, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4)
    compiled(x)
    masks = nets.masks_for(model)
    set_masks(compiled, masks)
    compiled(x).sum().backward()
    assert nets.pruned_gradients_are_zero(model, masks), "the compiled code is compiled anew"


@pytest.mark.slow
def test_compiled_optimizer_step():
    torch._dynamo.reset()
    model = nn.Linear(4, 3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).sum().backward()
        step()
        assert nets.raw_zero(model, masks)


def test_one_module_used_twice():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    masks = {"2.weight": nets.masks_for(shared)["weight"]}
    set_masks(model, masks)
    assert list(read(model)) == ["0.weight"]
    assert torch.equal(read(model)["0.weight"], masks["2.weight"])
    assert model[0] is model[2]
    verify(model)


class Tied(nn.Module):
    """An output layer that shares its weight with an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.embedding(tokens))


@pytest.mark.parametrize("graph", [True, False])
def test_one_parameter_under_two_names(graph):
    torch.manual_seed(0)
    model = torch.fx.symbolic_trace(Tied()) if graph else Tied()
    mask = nets.masks_for(model)["embedding.weight"]
    set_masks(model, {"out.weight": mask})
    assert list(read(model)) == ["embedding.weight"]
    assert model.out.weight is model.embedding.weight
    model(torch.arange(7)).square().sum().backward()
    assert (model.embedding.weight.grad[~mask] == 0).all()
    for twin in (model, copy.deepcopy(model)):
        set_masks(twin, {"embedding.weight": ~mask})
        assert torch.equal(twin.out.weight_mask, ~mask)
        assert torch.equal(twin.embedding.weight_mask, ~mask)
        verify(twin)
    with pytest.raises(ValueError, match=r"embedding\.weight.*out\.weight.* tied"):
        set_masks(model, {"embedding.weight": mask, "out.weight": ~mask})
    assert torch.equal(model.out.weight_mask, ~mask), "nothing was applied"
    model.out.weight_mask.copy_(mask)
    if model.out.weight_mask is not model.embedding.weight_mask:
        with pytest.raises(RuntimeError, match="tied"):
            verify(model)


def test_gradient_accumulation_and_checkpointing():
    torch.manual_seed(0)
    block = nets.Attention()
    masks = nets.masks_for(block)
    set_masks(block, masks)
    x = torch.randn(2, 5, 8)
    block(x).sum().backward()
    first = {name: value.grad.clone() for name, value in block.named_parameters()}
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    for name, value in block.named_parameters():
        assert torch.allclose(value.grad, 2 * first[name], atol=1e-5)
    assert nets.pruned_gradients_are_zero(block, masks)
