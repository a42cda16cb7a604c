"""SET and RigL: what moves, by how much, and what grows."""

import copy
import math

import pytest
import torch
from torch import nn

import fxprune
from fxprune.sparsity.budget import count, erk_densities
from fxprune.training import Pruner
from training import nets
from training.nets import made


def test_set_moves_weights_at_fixed_density() -> None:
    pruner = made("set", 0.7, total=20, frequency=4, stop=0.75, drop=0.4)
    shapes = {name: tuple(mask.shape) for name, mask in pruner.masks.items()}
    wanted = erk_densities(shapes, 0.3)
    numbers = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    for name, mask in pruner.masks.items():
        assert numbers[name] == pytest.approx(wanted[name] * mask.numel(), abs=1)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    for step in range(1, 21):
        nets.train_step(pruner.model, optimizer, step)
        before = {name: pruner.model.get_parameter(name).detach().clone() for name in numbers}
        masks = pruner.masks
        pruner.step(step)
        assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == numbers
        for name, mask in pruner.masks.items():
            weight = pruner.model.get_parameter(name)
            assert (weight[mask & ~masks[name]] == 0).all(), "what grows starts from zero"
            assert torch.equal(weight[mask & masks[name]], before[name][mask & masks[name]])
    assert [event.at for event in pruner.history] == [0, 4, 8, 12]
    assert all(event.pruned == event.grown > 0 for event in pruner.history[1:])
    same, other = made("set", 0.7, total=20), made("set", 0.7, total=20, seed=1)
    first = pruner.state_dict()
    assert torch.equal(same.masks["2.weight"], made("set", 0.7, total=20).masks["2.weight"])
    assert not torch.equal(same.masks["2.weight"], other.masks["2.weight"])
    assert first["history"][0]["at"] == 0


def test_rigl_grows_the_largest_gradients() -> None:
    pruner = made("rigl", 0.6, total=10, frequency=2, drop=0.4)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    nets.train_step(pruner.model, optimizer, 1)
    dense = copy.deepcopy(fxprune.finalize(pruner.model))
    nets.loss_of(dense, 2).backward()
    masks = pruner.masks
    digest = nets.digest(pruner.model)
    with torch.no_grad():
        plain = nets.loss_of(pruner.model, 2)
    seen = []

    def loss() -> torch.Tensor:
        seen.append(nets.loss_of(pruner.model, 2))
        return seen[-1]

    pruner.step(1, loss)
    assert not seen
    assert nets.digest(pruner.model) == digest
    pruner.step(2, loss)
    assert torch.equal(seen[0].detach(), plain), "open masks change nothing"
    for name, mask in pruner.masks.items():
        gradient = dense.get_parameter(name).grad
        assert gradient is not None
        grown = mask & ~masks[name]
        out = ~mask
        if grown.any():
            assert gradient[grown].abs().min() >= gradient[out].abs().max()
        part = 0.2 * (1 + math.cos(math.pi * 2 / 7.5))
        moved = min(count(int(masks[name].sum()), part), int((~masks[name]).sum()))
        assert int((masks[name] & ~mask).sum()) <= moved
        assert int(mask.sum()) == int(masks[name].sum())
        assert pruner.model.get_parameter(name).grad is not None
    assert sum(event.grown for event in pruner.history) > 0


def test_open_masks_leave_norms_and_dropout_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    pruner = Pruner(net, "rigl", 0.5, total=10, frequency=1, example_inputs=torch.ones(4, 6))
    before = {name: value.clone() for name, value in pruner.model.named_buffers() if "mask" not in name}
    state = torch.get_rng_state()
    pruner.step(1, lambda: nets.loss_of(pruner.model, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in before.items():
        assert torch.equal(pruner.model.get_buffer(name), value), name
    assert all(parameter.grad is None for parameter in pruner.model.parameters())
