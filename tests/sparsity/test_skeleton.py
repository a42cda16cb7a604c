"""Skeletons: few weights that put layers on a path; by weights, and by kernels of a circuit."""

from __future__ import annotations

import pytest
import torch
from lowering.agreement import lowered
from torch import Tensor, nn

from fxprune.graph import ChannelGraph
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import reach
from fxprune.sparsity.masks import Masks
from fxprune.sparsity.skeleton import KernelPaths, PathModel, Skeleton, WeightPaths


class Product(nn.Module):
    """Channels of one layer multiply each other: a path needs two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.last(y[..., :2] * y[..., 2:])
        return out


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv1d(4, 2, 1, bias=False))


NETS = {"product": (Product, torch.ones(1, 3)), "one-dimensional": (chain, torch.ones(1, 2, 5))}


def models(graph: ChannelGraph) -> dict[str, PathModel]:
    found = circuit(graph)
    assert found is not None
    return {"weights": WeightPaths(graph, "channel"), "kernels": KernelPaths(graph, found)}


def searched(net: str, kind: str, sizes: dict[str, Tensor] | None = None) -> tuple[ChannelGraph, Masks]:
    make, x = NETS[net]
    graph = lowered(make(), x)
    masks = {name: torch.zeros(kernels.shape, dtype=torch.bool) for name, kernels in graph.kernels.items()}
    dense = {name: torch.ones_like(mask) for name, mask in masks.items()}
    sizes = sizes or {name: torch.rand(mask.shape) * 0.9 + 0.05 for name, mask in masks.items()}
    skeleton = Skeleton(graph, models(graph)[kind], masks, sizes, dense, {})
    return graph, skeleton.build(list(masks))


@pytest.mark.parametrize("kind", ["weights", "kernels"])
@pytest.mark.parametrize("net", NETS)
def test_every_layer_lies_on_a_path_of_the_skeleton_alone(net: str, kind: str) -> None:
    graph, chosen = searched(net, kind)
    found = reach(graph, chosen, resolution="channel")
    assert all(bool(mask.any()) for mask in found.values())


@pytest.mark.parametrize("kind", ["weights", "kernels"])
def test_one_large_weight_for_each_layer_of_a_chain(kind: str) -> None:
    """Of all paths the one with the largest product of sizes is taken."""
    sizes = {"0.weight": torch.full((4, 2, 3), 0.5), "2.weight": torch.full((2, 4, 1), 0.5)}
    sizes["0.weight"][2, 1, 0], sizes["2.weight"][1, 2, 0] = 0.9, 0.9
    _, chosen = searched("one-dimensional", kind, sizes)
    assert chosen["0.weight"].nonzero().tolist() == [[2, 1, 0]]
    assert chosen["2.weight"].nonzero().tolist() == [[1, 2, 0]]


def test_kernels_are_as_good_as_their_best_weight() -> None:
    make, x = NETS["one-dimensional"]
    paths = models(lowered(make(), x))["kernels"]
    values = torch.tensor([[[1.0, 3.0, 2.0]], [[5.0, 4.0, 5.0]]])
    assert paths.entries(values).tolist() == [[3.0], [5.0]]
    marked = paths.weights(torch.tensor([[True], [True]]), values)
    assert marked.tolist() == [[[False, True, False]], [[True, False, False]]]
    matrix = torch.rand(2, 3)
    assert torch.equal(paths.entries(matrix), matrix)


class Gated(nn.Module):
    """Two residual blocks in which one layer multiplies another: no path through one without the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.gates = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(2))
        self.values = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(2))
        self.backs = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for gate, value, back in zip(self.gates, self.values, self.backs, strict=True):
            x = x + back(gate(x) * value(x))
        out: Tensor = self.last(x)
        return out


NETS["gated"] = (Gated, torch.ones(1, 6))


@pytest.mark.parametrize("kind", ["weights", "kernels"])
def test_a_skeleton_is_small(kind: str) -> None:
    """A path through each block takes a weight of each of its layers, and the ends are shared."""
    _, chosen = searched("gated", kind)
    numbers = {name: int(mask.sum()) for name, mask in chosen.items()}
    assert all(
        number == 1 for name, number in numbers.items() if name.startswith(("gates", "values", "backs"))
    )
    assert sum(numbers.values()) <= 10


@pytest.mark.parametrize("kind", ["weights", "kernels"])
def test_equal_weights_leave_one_path_not_all(kind: str) -> None:
    sizes = {
        name: torch.full(shape, 0.5) for name, shape in (("0.weight", (4, 2, 3)), ("2.weight", (2, 4, 1)))
    }
    _, chosen = searched("one-dimensional", kind, sizes)
    assert [int(mask.sum()) for mask in chosen.values()] == [1, 1]


class LinearAttention(nn.Module):
    """One layer makes all factors of a product: no weight of it alone leaves a path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.joint = nn.Linear(6, 8, bias=False), nn.Linear(8, 48, bias=False)
        self.last = nn.Linear(16, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.joint(self.first(x)).chunk(3, -1)
        out: Tensor = self.last(q.relu() @ (k.relu().transpose(1, 2) @ v))
        return out


NETS["linear attention"] = (LinearAttention, torch.ones(1, 5, 6))


@pytest.mark.parametrize("kind", ["weights", "kernels"])
def test_factors_that_one_layer_makes_are_chosen_together(kind: str) -> None:
    torch.manual_seed(0)
    _, chosen = searched("linear attention", kind)
    numbers = {name: int(mask.sum()) for name, mask in chosen.items()}
    assert numbers["joint.weight"] == 3
    assert sum(numbers.values()) <= 8
