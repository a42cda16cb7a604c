"""NTK-SAP against the expectation in closed form, a second implementation, and its promises."""

from typing import Any

import pytest
import torch
from torch import nn

from fxprune import methods
from fxprune.capture import capture
from fxprune.methods import Scores
from fxprune.sparsity.masks import is_subset, total
from methods.problems import problem

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(2))
Y = torch.arange(6) % 4


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *head)


@pytest.mark.slow
def test_expectation_of_a_linear_unit(scored: list[Scores]) -> None:
    # f = sum m w x: d/dm_i (eps sum m z x)^2 at m = 1 is 2 eps^2 x_i z_i sum z x, whatever w is. In the mean
    # over z and over noise x that is 2 eps^2; over 200 draws of z the standard deviation is 10 %.
    data = (torch.zeros(4000, 3), torch.zeros(4000))
    asked = problem(nn.Linear(3, 1), 0.5, data=data)
    methods.get("ntk-sap", rounds=1, repetitions=200, epsilon=0.5, init="own").find(asked)
    mean = scored[0]["weight"] / (200 * 4000)
    assert torch.allclose(mean, torch.full((1, 3), 2 * 0.25), rtol=0.25)


@pytest.mark.parametrize("init", ["own", "kaiming"])
def test_against_a_second_implementation(scored: list[Scores], init: str) -> None:
    """Two masked copies of the network, every draw repeated by hand."""
    net = conv_net()
    asked = problem(net, 0.6, data=(X, Y), seed=7)
    methods.get("ntk-sap", rounds=1, repetitions=2, epsilon=0.1, init=init).find(asked)

    generator = torch.Generator().manual_seed(7)
    torch.randint(2**62, (), generator=generator)  # the seed of the data
    expected: dict[str, Any] = dict.fromkeys(asked.weights, 0.0)
    for _ in range(2):
        noise = {"kaiming": lambda w: torch.randn(w.shape, generator=generator) * (2 / w[0].numel()) ** 0.5}
        drawn = {name: noise.get(init, lambda w: w)(w) for name, w in asked.weights.items()}
        moved = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in drawn.items()}
        x = torch.randn(X.shape, generator=generator)
        torch.randint(2**62, (), generator=generator)  # the seed of the pass
        gates = {name: torch.ones_like(w, requires_grad=True) for name, w in drawn.items()}
        conv = [
            nn.functional.conv2d(x, w["0.weight"] * gates["0.weight"], net[0].bias) for w in (drawn, moved)
        ]
        mean, var = conv[0].detach().mean((0, 2, 3)), conv[0].detach().var((0, 2, 3))
        outputs = [
            nn.functional.batch_norm(h, mean, var).relu().mean((2, 3)) @ (w["5.weight"] * gates["5.weight"]).T
            for h, w in zip(conv, (drawn, moved), strict=True)
        ]
        (outputs[0] - outputs[1]).square().sum().backward()
        expected = {name: expected[name] + gate.grad for name, gate in gates.items()}
    for name, score in scored[0].items():
        assert torch.allclose(
            score, expected[name].abs(), rtol=1e-3, atol=1e-5 * float(expected[name].abs().max())
        )


def test_pruned_weights_score_zero_and_stay_away(scored: list[Scores]) -> None:
    asked = problem(conv_net(), 0.8, data=(X, Y))
    masks = methods.get("ntk-sap", rounds=5).find(asked)
    assert total(masks) == asked.budget.total
    assert len(scored) == 5
    alive = [{name: score != 0 for name, score in scores.items()} for scores in scored]
    assert is_subset(alive[4], alive[3])
    assert total(alive[4]) < total(alive[3])


def test_the_model_is_left_alone() -> None:
    net = conv_net().train()
    net[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    asked = problem(net, 0.7, data=(X, Y))
    state = torch.get_rng_state()
    first = methods.get("ntk-sap", rounds=3).find(asked)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in asked.model.modules())
    assert net[1].momentum == 0.1
    again = methods.get("ntk-sap", rounds=3).find(problem(conv_net(), 0.7, data=(X * 5, Y)))
    assert all(torch.equal(first[name], again[name]) for name in first), "only shapes of the data count"


def test_without_data_shapes_come_from_the_captured_model() -> None:
    asked = problem(capture(conv_net(), X), 0.7)
    assert total(methods.get("ntk-sap", rounds=2).find(asked)) == asked.budget.total
    with pytest.raises(ValueError, match=r"the shapes of the inputs are not known, pass data=\.\.\."):
        methods.get("ntk-sap").find(problem(conv_net(), 0.7))


def test_token_ids_are_taken_from_the_data() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids).mean(1))

    ids = torch.randint(0, 10, (4, 5))
    net = Words()
    weights = {"head.weight": net.head.weight.detach()}
    asked = problem(net, 0.5, data=(ids, torch.zeros(4)), only=weights)
    assert total(methods.get("ntk-sap", rounds=2).find(asked)) == 9
    with pytest.raises(ValueError, match=r"an input of type torch.int64 cannot be noise; pass data=\.\.\."):
        methods.get("ntk-sap").find(problem(capture(net, ids), 0.5, only=weights))


def test_networks_that_are_cut_score_zero(scored: list[Scores]) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    cut = problem(net).masks
    cut["0.weight"][:] = cut["1.weight"][:1] = False
    asked = problem(net, 0.7, masks=cut, data=(torch.ones(4, 3), torch.zeros(4)))
    assert total(methods.get("ntk-sap", rounds=2).find(asked)) == 5
    assert not any(score.any() for scores in scored for score in scores.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"repetitions": 0}, "repetitions=0"), ({"epsilon": 0.0}, r"epsilon=0\.0, expected a number above 0")],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"method 'ntk-sap': {words}"):
        methods.get("ntk-sap", **options)
