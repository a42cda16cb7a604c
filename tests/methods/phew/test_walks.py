"""Walks against probabilities worked out by hand, and against paths found by ``reach``."""

from collections import Counter

import pytest
import torch
from nets import NETS
from torch import nn

from fxprune.methods.phew.walks import Walks
from fxprune.paths.count import reach
from fxprune.sparsity.masks import total
from methods.phew.walking import PLAIN, both, frequencies, walks_of
from methods.problems import asked, toy_a

NUMBER = 20000  # walks


def test_toy_a_forward_and_backward() -> None:
    # Inputs take turns: in1 goes to h1 with 1/3, h2 with 2/3; in2 with 1/2 each. One output.
    question = asked(toy_a(), torch.zeros(2, 2), 0.5)
    forward, backward = both(walks_of(question), NUMBER)
    first, second = question.weights
    expected = torch.tensor([[1 / 6, 1 / 4], [1 / 3, 1 / 4]])
    shape = question.weights[first].shape
    assert torch.allclose(frequencies(forward, first, shape), expected, atol=0.015)
    h = expected.sum(1)
    assert torch.allclose(frequencies(forward, second, torch.Size((1, 2)))[0], h, atol=0.015)
    # Backward: the output chooses h1 with 1/3; h1 its inputs alike, h2 in1 with 2/3.
    expected = torch.tensor([[1 / 6, 1 / 6], [4 / 9, 2 / 9]])
    assert torch.allclose(frequencies(backward, first, shape), expected, atol=0.015)


def test_inside_a_kernel_by_size() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5, 0.5, 1.0]).view(2, 1, 1, 3))
    question = asked(net, torch.zeros(2, 1, 5, 5), 0.5)
    forward, backward = both(walks_of(question), NUMBER)
    (name,) = question.weights
    expected = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.5, 1.0]) / 8
    assert torch.allclose(frequencies(forward, name, torch.Size((6,))), expected, atol=0.015)
    expected = torch.tensor([1 / 12, 2 / 12, 3 / 12, 1 / 8, 1 / 8, 1 / 4])
    assert torch.allclose(frequencies(backward, name, torch.Size((6,))), expected, atol=0.015)


class Skip(nn.Module):
    """h = A x; y = B h + h; out = C y, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, n, bias=False) for n in (2, 2, 1))
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
            self.b.weight.copy_(torch.tensor([[1.0, 4.0], [3.0, 1.0]]))
            self.c.weight.copy_(torch.tensor([[3.0, 1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return self.c(self.b(h) + h)


def test_a_fair_coin_where_paths_part_and_where_they_meet() -> None:
    question = asked(Skip(), torch.zeros(2, 2), 0.5)
    forward, backward = both(walks_of(question), NUMBER)
    square = torch.Size((2, 2))
    # Forward: h by A's columns, half of it through B by B's columns, the rest past it; then C.
    h = torch.tensor([(1 / 4 + 1 / 2) / 2, (3 / 4 + 1 / 2) / 2])
    through = torch.tensor([[1 / 4, 4 / 5], [3 / 4, 1 / 5]]) * h / 2
    assert torch.allclose(frequencies(forward, "b.weight", square), through, atol=0.015)
    last = (through.sum(1) + h / 2).view(1, 2)
    assert torch.allclose(frequencies(forward, "c.weight", torch.Size((1, 2))), last, atol=0.015)
    # Backward: y by C's row, half of it through B by B's rows, the rest straight to h; then A's rows.
    y = torch.tensor([3 / 4, 1 / 4])
    through = torch.tensor([[1 / 5, 4 / 5], [3 / 4, 1 / 4]]) * (y / 2).view(2, 1)
    assert torch.allclose(frequencies(backward, "b.weight", square), through, atol=0.015)
    h = through.sum(0) + y / 2
    first = torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]]) * h.view(2, 1)
    assert torch.allclose(frequencies(backward, "a.weight", square), first, atol=0.015)


@pytest.mark.parametrize("net", PLAIN)
def test_every_walk_is_a_path_by_itself(net: str) -> None:
    torch.manual_seed(0)
    question = asked(*NETS[net](), 0.5)
    for visits in both(walks_of(question), 6):
        assert visits.complete.tolist() == list(range(6))
        for walk in range(6):
            masks = {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in question.weights.items()}
            for name, weights in visits.weights.items():
                masks[name].view(-1)[weights[visits.walks[name] == walk]] = True
            effective = reach(question.graph, masks, resolution="channel")
            assert 0 < total(masks) == total(effective), net


def test_seeds_take_turns() -> None:
    question = asked(nn.Sequential(nn.Linear(5, 4, bias=False)), torch.zeros(2, 5), 0.5)
    forward, backward = both(walks_of(question), 20)
    assert Counter((forward.weights["0.weight"] % 5).tolist()) == dict.fromkeys(range(5), 4)
    assert Counter((backward.weights["0.weight"] // 5).tolist()) == dict.fromkeys(range(4), 5)


def test_channels_of_zeros_are_walked_evenly_and_dead_ends_avoided() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
        net[1].weight.fill_(1.0)
    question = asked(net, torch.zeros(2, 2), 0.5)
    usable = {"1.weight": torch.tensor([[True, True, False]])}  # the third hidden channel leads nowhere
    walks = Walks(question.graph, question.weights, usable)
    forward, _ = both(walks, NUMBER)
    found = frequencies(forward, "0.weight", torch.Size((3, 2)))
    assert torch.allclose(found, torch.tensor([[0.25, 0.25], [0.25, 0.25], [0.0, 0.0]]), atol=0.015)
