"""Models that fully_shard has split: their plain twins and their classes, in a group of one process."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, init_device_mesh
from torch.fx import GraphModule

import fxprune
from fxprune.rewrite import bare, set_masks
from fxprune.rewrite.masking.sharded import is_sharded, plain_twin

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
ASKED = {"example_inputs": X, "progress": False}


@pytest.fixture(autouse=True)
def mesh() -> Iterator[object]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.kept = self.first.bias * 2  # a result with a gradient function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(x)).relu())


def sharded(mesh: object) -> Net:
    model = Net()
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def test_the_twin_is_the_model_as_it_was_without_values(mesh: object) -> None:
    model = sharded(mesh)
    calls = []
    model.first.register_forward_hook(lambda *call: calls.append(call))
    model.compile(backend="eager")
    twin = plain_twin(model)
    assert is_sharded(model)
    assert not is_sharded(twin)
    assert type(twin) is Net
    assert [type(module) for module in twin.modules()] == [type(module) for module in Net().modules()]
    assert all(p.is_meta and type(p) is nn.Parameter for p in twin.parameters())
    shapes = [{n: p.shape for n, p in net.named_parameters()} for net in (twin, Net())]
    assert shapes[0] == shapes[1]
    assert twin.second.weight is twin.first.weight
    assert all(a is b for a, b in zip(twin.buffers(), model.buffers(), strict=True))
    assert torch.equal(twin.kept, model.kept)
    assert twin.kept.is_leaf
    assert not vars(twin).keys() - vars(Net()).keys()
    tables = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks")
    hooks = [len(getattr(module, table)) for module in twin.modules() for table in tables]
    assert sum(hooks) == 1
    twin.to_empty(device="cpu")(X)  # runs by itself, and the user's hook with it
    assert len(calls) == 1
    assert isinstance(model, FSDPModule)
    assert isinstance(model.first.weight, DTensor)
    model._compiled_call_impl = None
    assert model(X).shape == (2, 6)


def test_masks_give_the_same_class_before_and_after(mesh: object) -> None:
    mask = {"weight": torch.eye(4) > 0}
    before, after = nn.Linear(4, 4), nn.Linear(4, 4)
    set_masks(before, mask)
    for layer in (before, after):
        fully_shard(layer, mesh=mesh)
    set_masks(after, mask)
    assert type(before) is type(after)
    assert type(bare(after)) is nn.Linear
    set_masks(after, {"bias": torch.arange(4) > 1})  # another form of the same layer
    assert isinstance(after, FSDPModule)
    after.bias.to_local().data.fill_(1.0)
    assert torch.equal(after(torch.zeros(1, 4)), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_a_graph_that_is_split_keeps_its_masks_in_its_code(mesh: object) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.nn.functional.linear(x, self.inner.weight))

    alone = fxprune.apply(Reads(), "magnitude", 0.4, **ASKED)
    graph = fxprune.apply(Reads(), "magnitude", 0.4, **ASKED)
    fully_shard(graph, mesh=mesh)
    assert isinstance(graph, GraphModule)
    assert fxprune.analyze(graph).to_json() == fxprune.analyze(alone).to_json()
    graph.inner.weight.to_local().data.fill_(1.0)  # behind the masks' back
    alone.inner.weight.data.fill_(1.0)
    assert torch.equal(graph(X), alone(X))
    for model in (graph, alone):
        set_masks(model, fxprune.masks(model))
        fxprune.apply(model, "magnitude", 0.5, returns="inplace", **ASKED)
    masks = fxprune.masks(alone)
    assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(graph).items())
    fxprune.verify(graph)


def test_a_graph_that_is_split_has_its_standardised_weights_masked_twice(mesh: object) -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(24.0).view(4, 6))
            self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centred = self.weight - self.weight.mean(1, keepdim=True)
            return torch.nn.functional.linear(x, centred * self.gain[:, None])

    graph = fxprune.capture(Standardised(), X)
    fully_shard(graph, mesh=mesh)
    mask = torch.ones(4, 6).bool().tril()
    set_masks(graph, {"weight": mask})
    assert bool((graph(torch.eye(6)).T[~mask] == 0).all())
    fxprune.verify(graph)


@pytest.mark.filterwarnings("ignore:set_masks. 1 masks were set:UserWarning")
def test_what_is_not_split_by_rows_is_refused(mesh: object) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    with pytest.raises(ValueError, match=r"'0\.weight' has to be split over its rows.*Shard\(dim=1\)"):
        fxprune.apply(model, "magnitude", 0.5, returns="inplace", **ASKED)
    masks = {"0.weight": torch.ones(4, 6).bool().tril()}
    set_masks(model, masks)  # masks themselves go anywhere
    assert bool((model[0].weight.full_tensor()[~masks["0.weight"]] == 0).all())


def test_what_is_split_over_different_processes_is_refused(mesh: object) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[1], mesh=DeviceMesh.from_group(dist.new_group([0]), "cpu"))
    with pytest.raises(ValueError, match=r"'1\.weight' is split over other processes"):
        fxprune.apply(model, "magnitude", 0.5, returns="inplace", **ASKED)


def test_the_proof_is_about_what_is_stored(mesh: object) -> None:
    layer = nn.Linear(4, 4)
    fully_shard(layer, mesh=mesh)
    set_masks(layer, {"weight": torch.eye(4) > 0})
    stored = layer.weight
    layer(torch.ones(1, 4))
    assert layer.weight is not stored  # the gathered one
    stored.to_local().data.fill_(1.0)
    with pytest.raises(RuntimeError, match="weight: 12 pruned weights are not zero in storage"):
        fxprune.verify(layer)


def test_a_split_model_without_values_is_refused(mesh: object) -> None:
    with torch.device("meta"):
        model = nn.Linear(6, 4)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"'weight' has no values \(it is on the meta device\)"):
        fxprune.apply(model, "magnitude", 0.5, returns="inplace", **ASKED)
