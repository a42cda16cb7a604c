"""Wanda, by hand and against norms computed one layer at a time."""

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

import fxprune
from fxprune import methods
from fxprune.methods import Scores
from methods.problems import TOY_A_DATA, problem, toy_a


def plain(**options: int) -> methods.Method:
    return methods.get("wanda", compare="model", **options)


def test_toy_a(scored: list[Scores]) -> None:
    # Inputs (2, 1), hidden (1, 5): |W1| times (2, 1), |W2| times (1, 5).
    plain().find(problem(toy_a(), 0.5, data=TOY_A_DATA))
    assert [score.tolist() for score in scored[0].values()] == [[[2, 1], [4, 1]], [[1, 10]]]
    masks = methods.get("wanda").find(problem(toy_a(), 0.5, data=TOY_A_DATA))
    assert [mask.int().tolist() for mask in masks.values()] == [[[1, 0], [1, 0]], [[0, 1]]]


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_norms_of_convolutions_are_those_of_their_windows(
    scored: list[Scores], micro_batch: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
    ).double()
    x = torch.randn(8, 3, 7, 7, dtype=torch.float64)
    data = [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(4))]
    plain(batches=2).find(problem(model, 0.5, data=data, micro_batch=micro_batch))
    first, second = scored[0].values()
    norms = unfold(x, 3, stride=2, padding=1).square().sum((0, 2)).sqrt().view(1, 3, 3, 3)
    assert torch.allclose(first, model[0].weight.detach().abs() * norms)
    h = model[1](model[0](x)).detach()
    norms = unfold(h, 3, dilation=2, padding=2).square().sum((0, 2)).sqrt().view(2, 1, 2, 3, 3)
    expected = model[2].weight.detach().abs() * norms.expand(2, 3, 2, 3, 3).reshape(6, 2, 3, 3)
    assert torch.allclose(second, expected)


def test_norms_of_transposed_convolutions(scored: list[Scores]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    plain().find(problem(model, 0.5, data=(x, torch.zeros(5))))
    norms = x.square().sum((0, 2, 3)).sqrt().view(4, 1, 1, 1)
    assert torch.allclose(scored[0]["0.weight"], model[0].weight.detach().abs() * norms)


class Bare(nn.Module):
    """Parameters of the module's own in products of several kinds, one of them of both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(4, 5))
        self.two = nn.Parameter(torch.randn(6, 5))
        self.many = nn.Parameter(torch.randn(3, 6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x @ self.one)
        y = torch.addmm(torch.ones(6).to(x), y, self.two.t())
        return torch.bmm(y.expand(3, 7, 6), self.many)


def test_norms_of_bare_parameters(scored: list[Scores]) -> None:
    torch.manual_seed(0)
    model = Bare().double()
    x = torch.randn(7, 4, dtype=torch.float64)
    plain().find(problem(model, 0.5, data=(x, torch.zeros(7))))
    one, two, many = scored[0].values()
    y = torch.relu(x @ model.one).detach()
    z = (y @ model.two.t() + 1).detach()
    assert torch.allclose(one, model.one.detach().abs() * x.norm(dim=0)[:, None])
    assert torch.allclose(two, model.two.detach().abs() * y.norm(dim=0))
    assert torch.allclose(many, model.many.detach().abs() * z.norm(dim=0)[None, :, None])


def test_attention_shows_its_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(4, 5, 8)
    pruned = fxprune.apply(
        layer, "wanda", 0.5, example_inputs=x, data=(x, torch.zeros(4)), progress=False, compare="output"
    )
    masks = fxprune.masks(pruned)
    expected = layer.self_attn.in_proj_weight.detach().abs() * x.flatten(0, 1).norm(dim=0)
    kept = torch.zeros_like(masks["self_attn.in_proj_weight"])
    kept.scatter_(1, expected.topk(4, 1).indices, True)
    assert torch.equal(masks["self_attn.in_proj_weight"], kept)
    assert all(bool((mask.flatten(1).sum(1) == mask[0].numel() // 2).all()) for mask in masks.values())


def test_two_of_four_keeps_the_best_of_every_four() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(10, 8)
    pruned = fxprune.apply(
        model, "wanda", 0.5, granularity="nm(2,4)", exclude="2", example_inputs=x, data=(x, torch.zeros(10))
    )
    score = (model[0].weight.detach().abs() * x.norm(dim=0)).view(6, 2, 4)
    kept = torch.zeros(6, 2, 4, dtype=torch.bool).scatter_(2, score.topk(2, 2).indices, True)
    assert torch.equal(fxprune.masks(pruned)["0.weight"], kept.view(6, 8))


def test_weights_whose_inputs_are_hidden_are_named() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias)

    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="not seen, '0.weight' first"):
        fxprune.apply(
            nn.Sequential(Standardised(3, 4, 1)), "wanda", 0.5, example_inputs=x, data=(x, torch.zeros(2))
        )


def test_norms_of_half_precision_do_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).to(torch.float16)
    x = 300 * torch.ones(400, 4, dtype=torch.float16)  # 300^2 is beyond float16
    pruned = fxprune.apply(model, "wanda", 0.5, example_inputs=x, data=(x, torch.zeros(400)), progress=False)
    assert torch.equal(fxprune.masks(pruned)["0.weight"].sum(1), torch.full((6,), 2))
