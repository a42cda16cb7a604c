"""Wanda, by hand and against norms computed one layer at a time."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

import fxprune
from fxprune import methods
from fxprune.methods import Scores
from fxprune.scoring.data import Batch
from fxprune.scoring.gradients import masked
from fxprune.scoring.inputs import input_norms
from methods.experts import mixtral
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


def net_of_many_kinds() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 7),
    ).eval()  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("budget", ["global", "uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.93])
def test_masks_are_those_of_ranks(
    budget: str, sparsity: float, scored: list[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net_of_many_kinds(), torch.randn(16, 3, 8, 8)
    given = {"data": (x, torch.zeros(16)), "budget": budget, "progress": False, "example_inputs": x}
    found = fxprune.masks(fxprune.apply(model, "wanda", sparsity, **given))
    assert not scored
    monkeypatch.setattr("fxprune.methods.wanda._is_dense", lambda problem: False)
    expected = fxprune.masks(fxprune.apply(model, "wanda", sparsity, **given))
    assert scored
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("granularity", ["2:4", "4:8"])
def test_patterns_are_those_of_ranks(
    granularity: str, scored: list[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 6)
    ).eval()
    x = torch.randn(9, 8, 6, 6)
    given = {"data": (x, torch.zeros(9)), "progress": False, "example_inputs": x, "granularity": granularity}
    found = fxprune.masks(fxprune.apply(model, "wanda", 0.5, **given))
    assert not scored
    monkeypatch.setattr("fxprune.methods.wanda._is_full_pattern", lambda problem: False)
    expected = fxprune.masks(fxprune.apply(model, "wanda", 0.5, **given))
    assert scored
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_no_tensor_of_a_weight_s_shape_is_kept_for_norms() -> None:
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval(), torch.randn(20, 64)
    asked = problem(model, 0.5, data=(x, torch.zeros(20)))
    norms = input_norms(asked, masked(asked, asked.masks), [Batch(x, None)], "wanda")
    assert sum(one.numel() for places in norms.squares.values() for one in places.values()) == 64 + 48
    assert torch.allclose(norms.of("0.weight"), x.norm(dim=0).expand(48, 64))


class Experts(nn.Module):
    """Three experts in one parameter, of which the data never reaches the last."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = (x[:, :1] > 0).to(x)
        return torch.bmm(torch.stack([x * first, x * (1 - first), torch.zeros_like(x)]), self.up).sum(0)


def test_experts_without_a_token_are_named_and_ranked_by_magnitude() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(30, 6)
    with pytest.warns(UserWarning, match=r"no inputs are seen of up\[2\]; they are ranked by magnitude"):
        pruned = fxprune.apply(
            model, "wanda", 0.5, example_inputs=x, data=(x, torch.zeros(30)), compare="layer", progress=False
        )
    mask, size = fxprune.masks(pruned)["up"][2], model.up[2].detach().abs()
    assert mask.any()
    assert size[mask].min() > size[~mask].max()


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("compare", ["output", "layer"])
def test_weights_of_experts_compete_within_their_outputs(share: float, compare: str) -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(30, 6)
    with pytest.warns(UserWarning, match="no inputs are seen of"):
        pruned = fxprune.apply(model, "wanda", share, data=x, compare=compare, progress=False)
    mask, first = fxprune.masks(pruned)["up"], (x[:, :1] > 0).to(x)
    norms = torch.stack([(x * first).norm(dim=0), (x * (1 - first)).norm(dim=0)])
    scores = model.up[:2].detach().abs() * norms[:, :, None]
    assert int(mask.sum()) == round((1 - share) * 72)
    if compare == "output":
        counts = mask.sum(1)
        assert int(counts.max()) - int(counts.min()) <= 1
        lowest = torch.where(mask[:2], scores, torch.inf).amin(1)
        assert bool((lowest > torch.where(mask[:2], -1.0, scores).amax(1)).all())


@pytest.mark.slow
def test_experts_of_transformers_have_norms_of_the_tokens_they_get(scored: list[Scores]) -> None:
    model = mixtral()
    ids, taken = torch.randint(50, (16, 8)), []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: taken.extend(args[:2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxprune.apply(
            model, "wanda", 0.5, example_inputs={"input_ids": ids[:2]}, progress=False, compare="model",
            data=({"input_ids": ids}, torch.zeros(16)),
        )  # fmt: skip
    name = "model.layers.0.mlp.experts.gate_up_proj"
    hidden, choice = taken
    for expert in range(3):
        rows = hidden[(choice == expert).any(-1)]
        if len(rows):
            expected = experts.gate_up_proj[expert].detach().abs() * rows.norm(dim=0)
            assert torch.allclose(scored[0][name][expert], expected, atol=1e-5)


def test_bad_input_is_told_of() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(8, 4)
    broken = copy.deepcopy(model)
    broken[0].bias.data[1] = float("nan")
    given = {"example_inputs": x, "data": (x, torch.zeros(8)), "progress": False}
    with (
        pytest.warns(UserWarning, match=r"parameters hold NaN or infinite numbers: 0\.bias"),
        pytest.raises(ValueError, match=r"method 'wanda': the inputs of '2\.weight' are NaN or infinite"),
    ):
        fxprune.apply(broken, "wanda", 0.5, **given)
    words, tokens = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.tensor([[1, 7]])
    given = {"example_inputs": tokens % 5, "data": (tokens, torch.zeros(1)), "progress": False}
    with pytest.raises(ValueError, match="tokens of data run from 1 to 7, but embedding '0' has 5 rows"):
        fxprune.apply(words, "wanda", 0.5, **given)
    with pytest.raises(ValueError, match="tokens of data run from 1 to 7, but embedding '0' has 5 rows"):
        fxprune.apply(words, "magnitude", 0.5, budget="owl", **given)
