"""Transforms of ``torch.func`` in a forward: what they do to plain tensors is in the graph."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

import fxprune
from capture.faithful import assert_faithful
from fxprune.capture import capture
from fxprune.capture.tracer.overloads import public_call
from fxprune.capture.tracer.transforms import regrouped
from fxprune.rewrite import put_masks

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two layers, a norm and dropout, used as ``work`` says."""

    def __init__(self, work: Forward) -> None:
        super().__init__()
        self.work = work
        self.a, self.b, self.norm, self.drop = (
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.LayerNorm(4),
            nn.Dropout(),
        )
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self, x)


def _inner_loop(net: Net, x: Tensor) -> Tensor:
    weights = dict(net.a.named_parameters())
    slopes = grad(lambda w: functional_call(net.a, w, (x,)).square().sum())(weights)
    moved = {name: weights[name] - 0.01 * slopes[name] for name in weights}
    return net.b(functional_call(net.a, moved, (x,)))


def _kernel(net: Net, x: Tensor) -> Tensor:
    def distances(q: Tensor) -> Tensor:
        return vmap(vmap(lambda a, b: (a - b).square().sum(), (None, 0)), (0, None))(q, q)

    return vmap(distances)(net.a(x).view(-1, 3, 4))


WORK: dict[str, Forward] = {
    "layers": lambda net, x: vmap(lambda row: net.b(net.a(row).relu()))(x),
    "both": lambda net, x: net.batch_norm(net.drop(vmap(lambda row: net.b(net.a(row)))(x))),
    "attention": lambda net, x: vmap(lambda q: net.norm((q @ q.T).softmax(-1) @ q))(net.a(x).view(-1, 3, 4)),
    "groups": lambda net, x: vmap(lambda q: F.group_norm(q[None], 3)[0])(net.a(x).view(-1, 3, 2, 2)),
    "nested": _kernel,
    "random": lambda net, x: vmap(lambda row: net.b(net.drop(net.a(row))), randomness="different")(x),
    "hyper": lambda net, x: vmap(lambda row, w: row @ w)(x[:, None], net.b(net.a(x)).view(-1, 8, 1)),
    "grad": lambda net, x: net.b(net.a(x - vmap(grad(lambda row: net.a(row).tanh().sum()))(x))),
    "jacrev": lambda net, x: vmap(jacrev(lambda row: net.b(net.a(row).sigmoid())))(x),
    "hessian": lambda net, x: vmap(hessian(lambda row: net.a(row).tanh().sum()))(x),
    "jvp": lambda net, x: jvp(lambda y: net.b(net.a(y).tanh()), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", WORK)
def test_a_transform_is_captured(name: str) -> None:
    net = Net(WORK[name])
    with warnings.catch_warnings():  # PyTorch's own, when it first differentiates
        warnings.simplefilter("ignore", FutureWarning)
        net(torch.randn(2, 8))
    gm = assert_faithful(net, (8,))
    assert not [node for node in gm.graph.nodes if node.op == "call_module" and node.target == "a.weight"]
    assert not fxprune.lower(gm).opaque


@pytest.mark.filterwarnings("ignore:.*Python number of the batch size:UserWarning")
def test_a_step_of_learning_in_the_forward() -> None:
    net = Net(_inner_loop)
    x = torch.randn(4, 8)
    gm = capture(copy.deepcopy(net), x)
    assert torch.allclose(gm(x), net(x), atol=1e-6)
    assert {"a.weight", "b.weight"} == set(fxprune.lower(gm).kernels)
    with pytest.raises(AssertionError, match="size 4"):
        gm(torch.randn(5, 8))


def assert_same_effect(mine: Any, other: Any) -> None:
    """The same weights lie on as many paths."""
    assert mine.log_paths == pytest.approx(other.log_paths)
    assert mine.effective.keys() == other.effective.keys()
    assert all(torch.equal(mask, other.effective[name]) for name, mask in mine.effective.items())
    assert any(mask.any() and not mask.all() for mask in mine.effective.values())


def _plain(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).relu())


def test_paths_are_those_of_the_same_net_without_vmap() -> None:
    torch.manual_seed(0)
    mapped = Net(WORK["layers"])
    x = torch.randn(4, 8)
    pruned = fxprune.apply(mapped, "magnitude", 0.85, example_inputs=x, progress=False)
    masks = fxprune.masks(pruned)
    plain = capture(Net(_plain), x)
    put_masks(plain, masks)
    mine, other = fxprune.analyze(pruned), fxprune.analyze(plain)
    assert_same_effect(mine, other)


class Ensemble(nn.Module):
    """Three nets of the same form, in one batched product for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, buffers = stack_module_state(list(self.nets))
        each = vmap(lambda w, b: functional_call(self.nets[0], (w, b), (x,)))(weights, buffers)
        return each.mean(0)


class InTurn(Ensemble):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


@pytest.mark.slow
def test_the_weights_of_an_ensemble_are_those_of_its_nets() -> None:
    torch.manual_seed(0)
    net, x = Ensemble(), torch.randn(4, 8)
    gm = capture(net, x)
    assert torch.allclose(gm(torch.ones(7, 8)), net(torch.ones(7, 8)), atol=1e-6)
    graph = fxprune.lower(gm)
    assert set(graph.kernels) == {f"nets.{i}.{j}.weight" for i in range(3) for j in (0, 2)}
    assert not graph.opaque
    pruned = fxprune.apply(net, "synflow", 0.8, example_inputs=x, progress=False)
    plain = capture(InTurn(), x)
    put_masks(plain, fxprune.masks(pruned))
    mine, other = fxprune.analyze(pruned), fxprune.analyze(plain)
    assert_same_effect(mine, other)


class Stacked(nn.Module):
    """Small nets whose weights are stacked from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 6))
        self.second = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        def net(first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
            return F.linear(F.linear(x, first, bias).relu(), second)

        return vmap(net)(self.first, self.bias, self.second).mean(0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", ["magnitude", "synflow", "snip"])
def test_mapped_weights_are_pruned_and_train(method: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 8), torch.randint(4, (4,))
    net = Stacked()
    pruned = fxprune.apply(net, method, 0.8, example_inputs=x, data=(x, y), progress=False)
    assert {name: list(mask.shape) for name, mask in fxprune.masks(pruned).items()} == {
        "first": [3, 6, 8],
        "second": [3, 4, 6],
    }
    F.cross_entropy(pruned(x), y).backward()
    torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9).step()
    fxprune.verify(pruned)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "net.safetensors", Stacked())(x), pruned(x))


def test_gradients_by_autograd_are_one_operation() -> None:
    def force(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach()
            x.requires_grad = True
            energy = net.a(x).tanh().square().sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return net.b(net.a(-slope))

    gm = assert_faithful(Net(force), (8,))
    assert torch.autograd.grad in [node.target for node in gm.graph.nodes]
    with torch.no_grad():
        assert gm.eval()(torch.ones(2, 8)).shape == (2, 8)


def test_sizes_follow_those_of_the_input() -> None:
    assert regrouped((2, 3, 8), (6, 4, 2)) == [6, 4, 2]
    assert regrouped((6, 8), (2, 3, 1, 8)) == [2, 3, 1, 8]
    assert regrouped((0, 8), (8, 0)) == [8, 0]


def test_operators_are_called_by_their_public_names() -> None:
    aten, x = torch.ops.aten, torch.randn(1, 2, 6, 6)
    weight = torch.randn(4, 2, 3, 3)
    options: Any = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    calls = {
        F.conv2d: (aten.convolution.default, (x, weight, *options)),
        torch.softmax: (aten._softmax.default, (x, 1, False)),
        F.dropout: (aten.dropout.default, (x, 0.5, False)),
        Tensor.sum: (aten.sum.dim_IntList, (x, [1], True)),
        Tensor.reshape: (aten._unsafe_view.default, (x, [2, 36])),
        Tensor.__getitem__: (aten.slice.Tensor, (x, 2, 1, 2**63 - 1, 2)),
        torch.linalg.vector_norm: (aten.linalg_vector_norm.default, (x,)),
    }
    for function, (overload, args) in calls.items():
        found, given, named = public_call(overload, args, {})
        assert found is function
        assert torch.allclose(found(*given, **named), overload(*args), atol=1e-6)
