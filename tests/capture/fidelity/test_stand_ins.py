"""Layers that training alone calls, on what it draws or writes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from capture.faithful import assert_faithful


class Net(nn.Module):
    """``middle`` is what a net does between its layers in training."""

    def __init__(self, middle: Callable[["Net", Tensor], Tensor], before: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.extra = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.randn(16, 16))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        if self.training:
            h = self.middle(self, h)
        return self.c(h)


def noisy_gate(net: Net, h: Tensor) -> Tensor:
    return h + torch.randn_like(h) * F.softplus(h @ net.scale + net.extra(h))


def noise_in(net: Net, h: Tensor) -> Tensor:
    h += net.extra(torch.randn(h.shape[0], 16, device=h.device) * 0.1)
    return h


def mixed_up(net: Net, h: Tensor) -> Tensor:
    share, order = torch.rand(1), torch.randperm(h.shape[0])
    return share * h + (1 - share) * net.extra(h[order])


def dropped_in_between(net: Net, h: Tensor) -> Tensor:
    return h + 0.3 * net.extra(F.dropout(net.extra(h).relu(), 0.5, True))


def attends(net: Net, h: Tensor) -> Tensor:
    q = net.extra(h).view(-1, 4, 4)
    return h + F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).flatten(1)


def masked(net: Net, h: Tensor) -> Tensor:
    keep = torch.bernoulli(torch.full_like(h, 0.5))
    return net.extra(torch.where(keep > 0, h, torch.zeros_like(h)))


def drawn_into(net: Net, h: Tensor) -> Tensor:
    h = h + torch.empty_like(h).uniform_(-0.5, 0.5)
    return h + net.extra(torch.zeros_like(h).normal_())


def written_by_two_names(net: Net, h: Tensor) -> Tensor:
    whole, part = h, h[:, :8]
    part += net.extra(torch.randn(h.shape[0], 16))[:, :8]
    return whole


WAYS = [noisy_gate, noise_in, mixed_up, dropped_in_between, attends, masked, drawn_into, written_by_two_names]
NOTHING_FEWER = [noise_in, mixed_up, written_by_two_names]
"""Those that draw as many numbers when channels are gone."""


@pytest.mark.parametrize("middle", WAYS)
def test_what_training_does_alone_is_part_of_the_graph(middle: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    gm = assert_faithful(Net(middle), (8,))
    assert "extra" in {node.target for node in gm.graph.nodes}
    state = torch.random.get_rng_state()
    gm.eval()(torch.ones(2, 8))
    assert torch.equal(torch.random.get_rng_state(), state), "evaluation draws nothing"


@pytest.mark.parametrize("middle", WAYS)
def test_layers_of_training_alone_are_pruned_and_made_smaller(
    middle: Callable[[Net, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, x = Net(middle), torch.randn(4, 8)
    pruned = fxprune.apply(model, "magnitude", 0.3, granularity="channel", example_inputs=x, progress=False)
    assert "extra.weight" in fxprune.masks(pruned)
    small, final = fxprune.compact(pruned), fxprune.finalize(pruned)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in final.parameters())
    for training in (False, True) if middle in NOTHING_FEWER else (False,):
        found = []
        for network in (small, final):
            torch.manual_seed(1)
            found.append(copy.deepcopy(network).train(training)(x))
        torch.testing.assert_close(*found)
    small.train()(x).sum().backward()
    assert torch.isfinite(small.get_parameter("extra.weight").grad).all()


class Randomly(nn.Module):
    """Multiplies by random numbers in both modes."""

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(8, 16), nn.Linear(16, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * self.factor(h))


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "one minus": lambda h: 1 - torch.rand_like(h),
    "one minus one": lambda h: 1 - torch.rand(1),
    "a coin": lambda h: torch.empty(1, 1).bernoulli_(0.5),
    "an integer": lambda h: torch.randint(0, 2, (1,)),
    "an order": lambda h: torch.randperm(16) == 0,
    "a seldom event": lambda h: torch.rand_like(h) > 0.999,
    "a statistic": lambda h: 1 - h.square().mean(-1, keepdim=True).rsqrt(),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_random_numbers_are_no_numbers_to_compute_with(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Randomly(FACTORS[kind]), torch.randn(3, 8)
    state = torch.random.get_rng_state()
    report = fxprune.analyze(model, example_inputs=x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert report.effective_params == 8 * 16 + 16 * 4
