"""PX against the hand example, the explicit list of paths, and its promises."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from nets import NETS
from thinning import one_in
from torch import nn

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem, Scores
from fxprune.methods.px.active_paths import Activity
from fxprune.methods.px.output_activity import output_activities
from fxprune.paths.count import reach
from fxprune.paths.scaled import Scaled
from fxprune.scoring.data import Batch
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import Masks, dense, total
from methods.problems import TOY_A_DATA, toy_a

F = nn.functional


def px_problem(
    model: nn.Module, data: Any, sparsity: float = 0.5, masks: Masks | None = None, **fields: Any
) -> Problem:
    """A problem over all kernels of the captured model."""
    inputs = data[0] if isinstance(data, tuple) else data[0][0]
    gm = capture(model, inputs)
    graph = lower(gm)
    weights = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    start = masks or dense(weights)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Problem(
        model=gm,
        graph=graph,
        weights=weights,
        masks=start,
        budget=plan("global", sparsity, shapes),
        data=data,
        **fields,
    )


def activities(asked: Problem, masks: Masks | None = None) -> list[torch.Tensor]:
    found = output_activities(asked, masks or asked.masks, [Batch(*asked.data)])
    return [each.values * 2.0**each.power for each in found]


def real(activity: Activity, y: torch.Tensor) -> torch.Tensor:
    """The second number of y."""
    number = activity.paths[y]
    return number.values.double() * 2.0**number.power


def test_toy_a(scored: list[Scores]) -> None:
    # Both units are active, x^2 = (4, 1): the output has 5 + 5, times SynFlow-L2's 1 1 16 4 | 2 20.
    asked = px_problem(toy_a(), TOY_A_DATA)
    assert activities(asked)[0].tolist() == [10.0]
    methods.get("px", rounds=1).find(asked)
    found = torch.cat([score.flatten() for score in scored[0].values()])
    expected = torch.tensor([10.0, 10.0, 160.0, 40.0, 20.0, 200.0])
    assert torch.allclose(found / found.sum(), expected / expected.sum())


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def listed(net: nn.Sequential, masks: Masks) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Activity of every output and the scores, path by path, from the formula of the paper."""
    weights = [net[i].weight.detach() * masks[f"{i}.weight"] for i in (0, 2, 4)]
    first = F.linear(X, weights[0], net[0].bias)
    second = F.linear(first.relu(), weights[1], net[2].bias)
    patterns = [(first > 0).double(), (second > 0).double()]
    activity = torch.zeros(3, dtype=torch.float64)
    for i, j, k, out in product(range(3), range(4), range(5), range(3)):
        kept = masks["0.weight"][j, i] & masks["2.weight"][k, j] & masks["4.weight"][out, k]
        if kept:
            activity[out] += (X[:, i].double() ** 2 * patterns[0][:, j] * patterns[1][:, k]).sum()
    scores = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    for i, j, k, out in product(range(3), range(4), range(5), range(3)):
        places = ((j, i), (k, j), (out, k))
        value = activity[out]
        for weight, place in zip(weights, places, strict=True):
            value = value * weight[place].double() ** 2
        for score, place in zip(scores, places, strict=True):
            score[place] += value
    return activity, dict(zip(("0.weight", "2.weight", "4.weight"), scores, strict=True))


@pytest.mark.parametrize("pruned", [False, True])
def test_against_the_list_of_all_paths(scored: list[Scores], pruned: bool) -> None:
    net = mlp()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    if pruned:
        masks["4.weight"][[0, 1, 1], [0, 2, 3]] = False
        masks["0.weight"][2, 1] = False
    asked = px_problem(net, (X, torch.zeros(6)), masks=masks)
    activity, expected = listed(net, masks)
    assert torch.allclose(activities(asked)[0], activity)
    assert (len(activity.unique()) == 1) != pruned, "outputs differ once the classifier is pruned"
    methods.get("px", rounds=1).find(asked)
    whole = sum(score.sum() for score in expected.values())
    found = sum(score.double().sum() for score in scored[0].values())
    for name, score in expected.items():
        assert torch.allclose(scored[0][name].double() / found, score / whole, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (F.relu, lambda z: (z > 0).double()),
        (F.gelu, lambda z: 0.5 * (1 + torch.erf(z / 2**0.5))),
        (F.silu, torch.sigmoid),
        (F.hardswish, lambda z: (z + 3).clamp(0, 6) / 6),
        (lambda z: F.leaky_relu(z, 0.2), lambda z: torch.where(z > 0, 1.0, 0.2)),
        (torch.tanh, lambda z: torch.tanh(z) / z),
        (torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
        (lambda z: z.clone().relu_(), lambda z: (z > 0).double()),
    ],
    ids=["relu", "gelu", "silu", "hardswish", "leaky", "tanh", "sigmoid", "in place"],
)
def test_gains_of_activations(
    activation: Callable[..., torch.Tensor], gain: Callable[..., torch.Tensor]
) -> None:
    z = torch.linspace(-4, 4, 30)
    with Activity({}) as activity:
        activity.paths[z] = Scaled(torch.full_like(z, 3.0), 0, 0)
        y = activation(z)
        found = real(activity, y)
    assert torch.allclose(found, 3.0 * gain(z.double()).double().square(), atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (lambda z: F.leaky_relu(z, 0.2), 0.2),
        (lambda z: F.leaky_relu(z, 3.0), 1.0),
        (F.hardtanh, 1.0),
        (F.relu6, 0.0),
        (F.gelu, 0.5),
        (torch.sigmoid, 0.25),
    ],
    ids=["leaky", "steep", "hardtanh", "relu6", "gelu", "sigmoid"],
)
def test_at_exactly_zero_the_smaller_slope_counts(
    activation: Callable[..., torch.Tensor], gain: float
) -> None:
    for z in (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor(0.0)):
        with Activity({}) as activity:
            activity.paths[z] = Scaled(torch.full_like(z, 3.0), 0, 0)
            found = real(activity, activation(z))
        assert torch.allclose(found[z == 0], torch.tensor(3.0 * gain**2, dtype=torch.float64), atol=2e-3)


def test_values_times_gains_are_the_network() -> None:
    # One path per output, and squares of weights in place of masks: squared outputs come out.
    torch.manual_seed(0)
    first, second = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 1, 1)
    first[:, :, 0] = first[:, :, 2] = first[:, :, 1, ::2] = 0
    x = torch.randn(2, 4, 4, 4)
    with Activity({first: first.square(), second: second.square()}) as activity, torch.no_grad():
        activity.start(x)
        h = F.hardswish(F.conv2d(x, first, padding=1, groups=4))
        h = F.max_pool2d(F.gelu(F.batch_norm(h, torch.zeros(4), torch.ones(4), eps=0)), 2)
        y = F.leaky_relu(F.conv2d(h, second, groups=4).transpose(2, 3).flatten(2))
        found = real(activity, y)
    assert torch.allclose(found, y.double().square(), rtol=1e-4, atol=1e-7)


def test_attention_passes_values() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4)
    with Activity({}) as activity, torch.no_grad():
        activity.start((q, k, v))
        y = (q @ k.mT).softmax(-1) @ v
        found = real(activity, y)
    weights = (q @ k.mT).softmax(-1).double()
    assert torch.allclose(found, weights.square() @ v.double().square())


@pytest.mark.parametrize("net", one_in(2, NETS))
def test_any_network(net: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = methods.get("px", rounds=3, resolution="channel").find(
        px_problem(model, [(inputs, torch.zeros(1))], 0.6)
    )
    size = sum(mask.numel() for mask in masks.values())
    assert total(masks) == int(size * 0.4 + 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_activity_depends_on_the_data_alone_once_the_masks_are_given() -> None:
    asked = px_problem(mlp(), (X, torch.zeros(6)))
    twice = px_problem(mlp(), (torch.cat([X, X]), torch.zeros(12)))
    assert torch.allclose(2 * activities(asked)[0], activities(twice)[0])


def test_more_paths_than_a_float_can_count() -> None:
    # Every path is active, each layer multiplies their number by 64: 64^400 is 10^722.
    layers = [layer for _ in range(400) for layer in (nn.Linear(64, 64, bias=False), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(64, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(2**-6)
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    masks["800.weight"][0, ::2] = False
    (found,) = output_activities(px_problem(net, (x, None), masks=masks), masks, [Batch(x)])
    assert torch.allclose(found.values / found.values[1], torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64))
    expected = float(x.double().square().sum().log2()) + 400 * 6
    assert float(found.values[1].log2()) + found.power == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("exponent", [-70, 60])
def test_activity_scales_with_the_square_of_the_data(exponent: int) -> None:
    # Squares of these leave float32; a residual sum and a product meet numbers of other sizes.
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    torch.manual_seed(1)
    weights = [net[0].weight, net[2].weight]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    numbers = []
    for inputs in (x, x * 2.0**exponent):
        with Activity({w: torch.ones_like(w) for w in weights}) as activity, torch.no_grad():
            activity.start(inputs)
            numbers.append(activity.paths[net(inputs)])
    small, large = numbers
    assert torch.equal(small.values, large.values)
    assert large.power - small.power == 2 * exponent


def test_sums_of_very_different_numbers() -> None:
    # y = x + b x with a deep, dense b: the branch has all the paths but for one part in 10^60.
    x = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(8, 8)
    none = torch.zeros(8, 8)
    with Activity({ones: ones, none: none}) as activity, torch.no_grad():
        activity.start(x)
        branch = x
        for _ in range(70):
            branch = branch @ ones / 8
        left, right = activity.paths[x + branch], activity.paths[branch]
        unlit = activity.paths[x * 2.0**-70 + x @ none]
    assert left.power == right.power
    assert torch.allclose(left.values, right.values)
    assert torch.allclose(unlit.values * 2.0**unlit.power, x.square())


def test_no_layer_collapses_in_a_hundred_rounds(scored: list[Scores]) -> None:
    torch.manual_seed(0)
    layers = [
        layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    data = (torch.randn(8, 3, 8, 8), torch.arange(8))
    masks = methods.get("px", resolution="channel").find(px_problem(net, data, 0.982))
    assert all(mask.any() for mask in masks.values())
    assert len(scored) == 100
    for scores, later in pairwise(scored):
        assert all(bool((score >= 0).all()) for score in scores.values())
        assert sum(int((score > 0).sum()) for score in later.values()) > 0
    assert all(bool((score > 0).all()) for score in scored[0].values())


class Residual(nn.Module):
    """Three residual branches that carry next to nothing, one of them already pruned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        with torch.no_grad():
            for branch in self.branches:
                branch.weight.mul_(1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x).relu()
        return self.last(x)


def test_branches_that_a_skip_passes_keep_a_path() -> None:
    # All paths cross the first and the last layer; the sum of scores of a branch may fall to nothing.
    asked = px_problem(Residual(), (X, torch.zeros(6)), 0.9)
    asked.masks["branches.1.weight"][:] = False
    masks = methods.get("px").find(asked)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(kept.values()) == asked.budget.total == 14
    assert (kept["branches.0.weight"], kept["branches.1.weight"], kept["branches.2.weight"]) == (1, 0, 1)
    on_path = reach(asked.graph, masks)
    assert on_path["branches.0.weight"].any()
    assert on_path["branches.2.weight"].any()
    untouched = methods.get("px").find(replace(asked, invert=True))
    assert total(untouched) == 14


def test_a_budget_that_is_too_small_for_every_branch() -> None:
    asked = px_problem(Residual(), (X, torch.zeros(6)), 0.98)
    masks = methods.get("px").find(asked)
    assert total(masks) == asked.budget.total == 3
    assert reach(asked.graph, masks)["last.weight"].any()


def test_a_dense_classifier_needs_no_pass() -> None:
    net = mlp()
    passes: list[int] = []
    asked = px_problem(net, (X, torch.zeros(6)))
    asked.model.register_forward_hook(lambda *_: passes.append(1))
    methods.get("px", rounds=1).find(asked)
    assert not passes
    methods.get("px", rounds=4).find(asked)
    assert passes


def test_mapping_batches() -> None:
    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).sum()

    pair = px_problem(mlp(), (X, torch.zeros(6)))
    found = methods.get("px", rounds=2).find(pair)
    gm = pair.model
    mapped = Problem(
        model=gm, graph=pair.graph, weights=pair.weights, masks=pair.masks, budget=pair.budget, data={"x": X},
        loss_fn=loss_fn,
    )  # fmt: skip
    again = methods.get("px", rounds=2).find(mapped)
    assert all(torch.equal(found[name], again[name]) for name in found)
