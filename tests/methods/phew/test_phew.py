"""PHEW's walks against probabilities worked out by hand, and against paths found by `reach`."""

from collections import Counter
from typing import Any

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

import fxprune
from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.phew.walks import Visits, Walks
from fxprune.paths.count import reach
from fxprune.sparsity.masks import is_subset, kept, total
from methods.problems import problem, toy_a

NUMBER = 20000  # walks
PLAIN = """mlp conv_chain residual projection dense split shuffle grouped multiplier strided flatten
transposed
pixel_shuffle two_inputs two_outputs conv1d mixer""".split()


def asked(model: nn.Module, inputs: Any, sparsity: float, **fields: Any) -> Problem:
    gm = capture(model, inputs)
    graph = lower(gm)
    only = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    return problem(gm, sparsity, graph=graph, only=only, **fields)


def walks_of(question: Problem) -> Walks:
    return Walks(question.graph, question.weights)


def both(walks: Walks, number: int) -> tuple[Visits, Visits]:
    generator = torch.Generator().manual_seed(0)
    return walks.forward(torch.arange(number), generator), walks.backward(torch.arange(number), generator)


def frequencies(visits: Visits, name: str, shape: torch.Size) -> torch.Tensor:
    counts = torch.bincount(visits.weights[name], minlength=shape.numel())
    return (counts / len(visits.complete)).view(shape)


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


@pytest.mark.parametrize("net", one_in(2, sorted(NETS)))
def test_every_network_can_be_walked_and_keeps_the_budget(net: str) -> None:
    torch.manual_seed(0)
    question = asked(*NETS[net](), 0.8)
    for visits in both(walks_of(question), 50):
        assert len(visits.complete) == 50
    masks = methods.get("phew").find(question)
    assert total(masks) == question.budget.total
    effective = reach(question.graph, masks, resolution="channel")
    if net in PLAIN:
        assert total(effective) == total(masks)


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


def test_large_weights_are_preferred_and_whole_kernels_kept_when_asked() -> None:
    torch.manual_seed(0)
    net, inputs = NETS["conv_chain"]()
    question = asked(net, inputs, 0.8)
    masks = methods.get("phew").find(question)
    for name, weight in question.weights.items():
        assert float(weight[masks[name]].abs().mean()) > 1.2 * float(weight[~masks[name]].abs().mean())
    whole = methods.get("phew", kernel=True).find(asked(net, inputs, 0.8))
    full = [sum(int((m.flatten(2).sum(2) == 9).sum()) for m in found.values()) for found in (masks, whole)]
    assert full[1] >= 20 > 5 > full[0]
    assert total(whole) == total(masks)


@pytest.mark.parametrize("sparsity", [0.02, 0.3])
def test_low_sparsities_end(sparsity: float) -> None:
    torch.manual_seed(0)
    net, inputs = NETS["projection"]()
    with torch.no_grad():
        next(net.parameters())[:, 0] = 0.0  # no walk prefers these
    question = asked(net, inputs, sparsity)
    assert total(methods.get("phew").find(question)) == question.budget.total


def test_budgets_by_layer_and_masks_before() -> None:
    torch.manual_seed(0)
    net, inputs = NETS["dense"]()
    question = asked(net, inputs, 0.7, budget="erk")
    masks = methods.get("phew").find(question)
    assert kept(masks) == question.budget.layers
    again = asked(net, inputs, 0.8, masks=masks)
    fewer = methods.get("phew").find(again)
    assert is_subset(fewer, masks)
    assert total(fewer) == again.budget.total


def test_nothing_collapses_at_extreme_sparsity_and_no_weight_is_wasted() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(a, 12, 3, padding=1, bias=False) for a in (3, 12, 12, 12, 12)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5, bias=False))
    example = torch.ones(1, 3, 8, 8)
    report = fxprune.analyze(
        fxprune.apply(net, "phew", 0.99, example_inputs=example, progress=False), example_inputs=example
    )
    assert report.kept_params == report.effective_params
