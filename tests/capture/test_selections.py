"""Entries picked by a mask that the network computes: how many there are differs from input to input."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower

Function = Callable[[Tensor], Tensor]


class Picking(nn.Module):
    def __init__(self, pick: Function) -> None:
        super().__init__()
        self.first, self.pick, self.last = nn.Linear(4, 6), pick, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.pick(self.first(x)))
        return result


class Experts(nn.Module):
    """Tokens go to their two best experts, one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.reshape(x.shape)


def _replaced(x: Tensor) -> Tensor:
    y, mask = x.clone(), x.sum(-1) > 0
    y[mask] = x[mask].flip(-1)
    return y


FORMS: dict[str, Function] = {
    "rows of all samples": lambda x: x[x.sum(-1) > 0],
    "rows of one axis": lambda x: x[:, x.sum((0, 2)) > -9.0],
    "rows at places": lambda x: x[torch.nonzero(x.sum((1, 2)) > 0)[:, 0]],
    "rows by where": lambda x: x[torch.where(x.sum(-1) > 0)],
    "masked_select": lambda x: x * x.masked_select(x > 0).mean(),
    "rows written back": _replaced,
    "how many": lambda x: x * (x > 0).nonzero().shape[0],
}


@pytest.mark.parametrize("name", FORMS)
def test_the_graph_picks_as_the_model_does(name: str) -> None:
    torch.manual_seed(0)
    model = Picking(FORMS[name])
    gm = capture(model, torch.randn(2, 5, 4))
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(2, 5, 4)
        assert torch.equal(gm(x), model(x))
    graph = lower(gm, strict=True)
    assert not graph.opaque
    assert set(graph.kernels) == {"first.weight", "last.weight"}


def test_experts_are_entered() -> None:
    torch.manual_seed(0)
    model = Experts()
    gm = capture(model, torch.randn(2, 5, 4))
    for seed in range(3):
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(gm(x), model(x))
    graph = lower(gm, strict=True)
    assert not graph.opaque
    assert {name for name in graph.kernels if "expert" in name} == {f"experts.{i}.weight" for i in range(3)}


def test_code_that_asks_how_many_keeps_its_module_whole() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x[x.sum(-1) > 0]
            return rows if rows.shape[0] > 3 else x.flatten(0, 1)

    net = nn.Sequential(nn.Linear(4, 6), Asking())
    with pytest.warns(UserWarning, match="1 .Asking. kept whole: .* they decide a length"):
        gm = capture(net, torch.randn(2, 5, 4))
    for seed in range(4):
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed)) * 3
        assert torch.equal(gm(x), net(x))


def test_a_part_that_draws_in_training_stays_whole_and_leaves_the_rest() -> None:
    class Dropping(nn.Module):
        """Masks by a number of Python's, and skips a layer by one of PyTorch's."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x * random.random()
                if torch.rand([]) < 0.5:
                    return x
            result: Tensor = self.layer(x)
            return result

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), Dropping(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match="1 .Dropping. kept whole"):
        gm = capture(net, torch.randn(2, 4))
    x = torch.randn(2, 4)
    for training in (False, True):
        gm.train(training), net.train(training)
        for seed in range(4):
            results = []
            for network in (gm, net):
                torch.manual_seed(seed), random.seed(seed)
                results.append(network(x))
            assert torch.equal(*results)


class OwnLoops(nn.Module):
    """Drops edges from a node to itself, adds one for each, and weighs these more, as ClusterGCN does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        kept = edges[:, edges[0] != edges[1]]
        loops = torch.arange(len(x), device=kept.device)
        both = torch.cat([kept, torch.stack([loops, loops])], 1)
        row, col = both[0], both[1]
        degree = torch.zeros(len(x)).index_add(0, col, torch.ones(col.shape)).reciprocal()
        weights = degree[col]
        weights[row == col] += 0.5 * degree
        y = torch.zeros(len(x), 6).index_add(0, col, self.first(x)[row] * weights[:, None])
        result: Tensor = self.last(y.relu())
        return result


@pytest.mark.filterwarnings("error:capture")
def test_sizes_of_what_is_picked_from_the_example_are_those_of_the_example() -> None:
    torch.manual_seed(0)
    model, edges = OwnLoops(), torch.tensor([[0, 1, 2, 2, 3], [1, 1, 0, 3, 3]])
    gm = capture(model, (torch.randn(4, 4), edges))
    assert not lower(gm).opaque
    for nodes, given in ((4, edges), (4, edges[:, :4]), (5, torch.tensor([[4, 2, 0], [0, 2, 0]]))):
        x = torch.randn(nodes, 4)
        assert torch.equal(gm(x, given), model(x, given))
