"""Run in the processes of the distributed tests, each a fresh interpreter."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fxprune.rewrite import finalize, read, set_masks, verify
from rewrite import nets

WORLD = 2


def start(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))


class Net(nn.Module):
    """A convolution, attention, a weight-standardised convolution and a linear layer; no batch statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.std = nets.LAYERS["std"][0]()
        self.std = type(self.std)(8, 8, 3)
        self.attention = nets.Attention()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.std(self.conv(x).relu()).relu()
        x = self.attention(x.flatten(2).transpose(1, 2))
        return self.fc(x.mean(1))


def batches(steps=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(steps)]


def optimizer_for(model):
    # Not Adam: it blows up the rounding of gradients that are zero in theory (the biases of attention keys).
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def train(model, part=slice(None)):
    optimizer = optimizer_for(model)
    for x in batches():
        optimizer.zero_grad()
        model(x[part]).square().mean().backward()
        optimizer.step()


def alone(masks):
    """The same training in one process."""
    model = Net()
    set_masks(model, masks)
    train(model)
    return dict(model.named_parameters())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(model, masks):
    expected = alone(masks)
    for name, value in model.named_parameters():
        value = whole(value.detach())
        assert torch.allclose(value, expected[name], atol=1e-5), name
        if name in masks:
            assert (value[~masks[name]] == 0).all(), name
    for name, mask in read(model).items():
        gathered = [torch.empty_like(mask, dtype=torch.uint8) for _ in range(WORLD)]
        dist.all_gather(gathered, mask.to(torch.uint8))
        assert torch.equal(gathered[0], gathered[1]), name
        assert torch.equal(mask, masks[name]), name


def run(rank, port):
    """All tests in one pair of processes: starting them takes longer than running."""
    start(rank, port)
    data_parallel(rank)
    fully_sharded(rank)
    masked_after_sharding(rank)
    split_by_others()
    dist.destroy_process_group()


def data_parallel(rank):
    model = Net()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    train(DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))
    compare(model, masks)
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    changed = nets.masks_for(model, seed=7)
    set_masks(wrapped, changed)
    wrapped(batches(1)[0]).sum().backward()
    assert all(torch.equal(read(wrapped)[name], mask) for name, mask in changed.items())


def fully_sharded(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    model = Net()
    masks = nets.masks_for(model)
    set_masks(model, masks)
    for part in (model.conv, model.std, model.attention, model.fc):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.fc.weight, DTensor)
    train(model, slice(2 * rank, 2 * rank + 2))
    compare(model, masks)
    changed = nets.masks_for(model, seed=7)
    set_masks(model, changed)
    for name, mask in changed.items():
        assert (whole(model.get_parameter(name).detach())[~mask] == 0).all(), name
    verify(model)


def masked_after_sharding(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    model = Net()
    masks = nets.masks_for(model)
    for part in (model.conv, model.std, model.attention, model.fc):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    set_masks(model, masks)
    classes = [type(part).__name__ for part in (model.conv, model.fc)]
    assert classes == ["FSDPMaskedConv2d", "FSDPMaskedLinear"]
    assert isinstance(model.fc, FSDPModule)
    verify(model)
    train(model, slice(2 * rank, 2 * rank + 2))
    compare(model, masks)
    # A forward leaves the root's parameters whole: masks reach what is stored all the same.
    wide = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(wide, mesh=mesh)
    wide(torch.ones(1, 4))
    assert not isinstance(wide[0].weight, DTensor)
    set_masks(wide, {"0.weight": torch.eye(4) > 0})
    assert (wide[0].weight.full_tensor()[~read(wide)["0.weight"]] == 0).all()
    with pytest.raises(ValueError, match=r"full state dict.*not split"):
        finalize(wide)


def split_by_others():
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (WORLD,))))
    with pytest.raises(RuntimeError, match=r"'weight'.*before it is distributed"):
        set_masks(model, {"weight": torch.eye(4) > 0})
