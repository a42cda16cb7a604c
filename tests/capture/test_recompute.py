"""Activation checkpointing stays: in the code of the graph, not in its nodes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxprune
from fxprune.capture import capture
from fxprune.capture.recompute import OpenRegions


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(width, 64), nn.Linear(64, width), nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.b(self.drop(self.a(x).relu()))
        return x + y if shift is None else x + y + shift, y


class Net(nn.Module):
    """Blocks of which one returns more than is read, and one reads what comes from farther back."""

    def __init__(self, reentrant: bool = False, always: bool = False) -> None:
        super().__init__()
        self.reentrant, self.always = reentrant, always
        self.blocks, self.out = nn.ModuleList(Block() for _ in range(4)), nn.Linear(16, 3)
        self.tail = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        shift = x * 2
        for block in self.blocks:
            if self.training or self.always:
                x, y = checkpoint(block, x, shift, use_reentrant=self.reentrant)
            else:
                x, y = block(x, shift)
        if self.training:
            x = checkpoint_sequential(self.tail, 2, x, use_reentrant=self.reentrant)
        else:
            x = self.tail(x)
        return self.out(x + y)


def saved(model: nn.Module, x: Tensor) -> int:
    """Numbers that the forward keeps for the backward, parameters aside."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return count


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_regions_are_recomputed_with_the_same_draws(reentrant: bool, always: bool) -> None:
    torch.manual_seed(0)
    model = Net(reentrant, always)
    x = torch.randn(5, 16, requires_grad=True)
    gm = capture(model, x)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"][:4] == [
        "blocks.0.a", "blocks.0.drop", "blocks.0.b", "blocks.1.a",
    ]  # fmt: skip
    plain = Net().eval()
    for form in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        form.train(), model.train()
        assert all(map(torch.equal, gradients(form, x), gradients(model, x)))
        assert saved(form, x) < saved(plain, x) / 3
        form.eval(), model.eval()
        assert torch.equal(form(x), model(x))
        assert (saved(form, x) < saved(plain, x) / 2) == always


@pytest.mark.slow
def test_a_pruned_graph_recomputes() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 16)
    pruned = fxprune.apply(model, "magnitude", 0.5, example_inputs=x).train()
    masks = fxprune.masks(pruned)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    grads = gradients(model.train(), x)
    names = [name for name, _ in model.named_parameters()]
    for name, mine, theirs in zip(names, gradients(pruned, x), grads, strict=True):
        assert torch.allclose(mine, theirs * masks.get(name, 1), atol=1e-6)
    assert "torch.utils.checkpoint.checkpoint" in pruned.code
    small = fxprune.compact(fxprune.apply(Net(), "magnitude", 0.5, example_inputs=x, granularity="channel"))
    assert small.code.count("torch.utils.checkpoint.checkpoint") == 5  # the last part of a sequence is none
    assert all(bool(grad.isfinite().all()) for grad in gradients(small.train(), x))


class Texts(nn.Module):
    """A region with a frozen number of an argument, in whose message stand names of values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def inner(self, x: Tensor, scale: float) -> Any:
        y = self.layer(x) * scale
        return y.chunk(2, 1)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        first, second = checkpoint(self.inner, x, scale, use_reentrant=False)
        return torch.cat([second, first], 1).view(x.shape[0], -1)


def test_names_in_texts_and_results_in_lists() -> None:
    torch.manual_seed(0)
    model, x = Texts(), torch.randn(3, 4)
    gm = capture(model, x)
    assert torch.equal(gm(x), model(x))
    assert all(map(torch.equal, gradients(gm, x), gradients(model, x)))


class Fails(nn.Module):
    """A checkpointed part that has to stay whole, before a part that is not checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.part, self.last = Asks(reentrant), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x)).relu()


class Asks(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.layer = reentrant, nn.Linear(4, 4)

    def inner(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if float(y.detach().sum()) > 0 else -y

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:.*kept whole", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_region_that_fails_ends_with_its_part(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Fails(reentrant), torch.randn(3, 4, requires_grad=True)
    gm = capture(model, x)
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["part", "last"]
    assert not [node for node in gm.graph.nodes if "checkpoint" in node.meta]
    assert torch.equal(gm(x), model(x))


def test_a_region_ends_with_those_that_began_inside_of_it_and_once() -> None:
    regions, outer, inner = OpenRegions(), object(), object()
    assert regions.current is None
    regions.begin(outer)
    first = regions.current
    regions.begin(inner)
    assert regions.current == first
    regions.end(outer)
    regions.end(inner)
    regions.end(outer)
    assert regions.current is None
    regions.begin(outer)
    assert regions.current != first
