"""Criteria of trained networks, each against a computation from its formula by other means."""

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import methods
from fxprune.methods import Scores
from methods.problems import TOY_A_DATA, half_square, problem, toy_a

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
Y = torch.arange(6) % 3


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(x.double()), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.dim() > 1}


def test_lamp_by_hand(scored: list[Scores]) -> None:
    # W1 = [[1, -1], [2, 1]]: 4/4, then 1/5, 1/6, 1/7 in the order of the layer; W2 = [[1, -2]]: 1/5, 4/4.
    masks = methods.get("lamp").find(problem(toy_a(), 3 / 6))
    first, second = scored[0].values()
    assert torch.allclose(first, torch.tensor([[1 / 5, 1 / 6], [1.0, 1 / 7]], dtype=torch.float64))
    assert torch.allclose(second, torch.tensor([[1 / 5, 1.0]], dtype=torch.float64))
    assert [mask.int().tolist() for mask in masks.values()] == [[[1, 0], [1, 0]], [[0, 1]]]


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_lamp_never_empties_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 5))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    pruned = fxprune.apply(model, "lamp", 0.99, example_inputs=torch.ones(1, 20), progress=False)
    assert all(mask.any() for mask in fxprune.masks(pruned).values())


def test_taylor_averages_the_squares_of_batches(scored: list[Scores]) -> None:
    model = net()
    data = [(X[:2].double(), Y[:2]), (X[2:].double(), Y[2:])]
    methods.get("taylor", batches=2).find(problem(model, 0.5, data=data))
    slopes = [gradient(model, x, y) for x, y in data]
    for name, score in scored[0].items():
        weight = model.get_parameter(name).detach()
        expected = torch.stack([(weight * slope[name]).square() for slope in slopes]).mean(0)
        assert torch.allclose(score, expected, rtol=1e-9)


def test_taylor_by_hand(scored: list[Scores]) -> None:
    # x = (2, 1), h = (1, 5), f = 1 - 10 = -9, loss 81 / 2, dL/df = -9.
    methods.get("taylor").find(problem(toy_a(), 0.5, data=TOY_A_DATA, loss_fn=half_square))
    first, second = scored[0].values()
    assert second.tolist() == [[(1 * 1 * -9) ** 2, (-2 * 5 * -9) ** 2]]
    assert first.tolist() == [[18.0**2, 9.0**2], [72.0**2, 18.0**2]]


@pytest.mark.parametrize("samples", [4, 64])
def test_obd_takes_gradients_of_single_samples(scored: list[Scores], samples: int) -> None:
    model = net()
    data = [(X[:3].double(), Y[:3]), (X[3:].double(), Y[3:])]
    methods.get("obd", batches=2, samples=samples).find(problem(model, 0.5, data=data))
    number = min(samples, 6)
    slopes = [gradient(model, X[i : i + 1], Y[i : i + 1]) for i in range(number)]
    for name, score in scored[0].items():
        weight = model.get_parameter(name).detach()
        fisher = torch.stack([slope[name].square() for slope in slopes]).mean(0)
        assert torch.allclose(score, weight.square() * fisher / 2, rtol=1e-9)


def conv_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3),
    ).eval()  # fmt: skip


def kept_channels(pruned: nn.Module, name: str) -> list[int]:
    return fxprune.masks(pruned)[name].flatten(1).any(1).nonzero().flatten().tolist()


def channels(method: str, model: nn.Module, sparsity: float, **options: Any) -> nn.Module:
    x = torch.randn(1, 2, 5, 5)
    return fxprune.apply(
        model, method, sparsity, granularity="channel", example_inputs=x, progress=False, **options
    )


def test_fpgm_removes_the_filter_nearest_to_the_others() -> None:
    model = conv_net()
    with torch.no_grad():  # filter 2 lies in the middle of the others, far from zero; filter 5 is small
        model[0].weight.copy_(
            torch.tensor([4.0, 8.0, 6.0, 7.0, 5.0, 0.1]).view(6, 1, 1, 1).expand(6, 2, 3, 3)
        )
    kept = kept_channels(channels("fpgm", model, 0.2, scope="layer"), "0.weight")
    gone = set(range(6)) - set(kept)
    assert gone
    assert gone <= {2, 3, 4}


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_fpgm_reads_transposed_filters(scored: list[Scores]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    fxprune.apply(model, "fpgm", 0.3, example_inputs=torch.ones(1, 4, 3, 3), progress=False)
    weight = model[0].weight.detach()  # (in, out / groups, ...)
    filters = [weight[2 * g : 2 * g + 2, o].flatten().double() for g in range(2) for o in range(3)]
    mean = sum(float((own - other).norm()) for own in filters for other in filters) / len(filters)
    for number, own in enumerate(filters):
        group, place = divmod(number, 3)
        expected = sum(float((own - other).norm()) for other in filters) / mean
        score = scored[0]["0.weight"][2 * group : 2 * group + 2, place]
        assert torch.allclose(score, torch.full_like(score, expected))


def test_bn_scale_removes_what_norms_scale_down() -> None:
    model = conv_net()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.9, 0.1, 0.8, 0.7, -0.05, 0.6]))
    kept = kept_channels(channels("bn-scale", model, 0.3), "0.weight")
    assert not {1, 4} & set(kept)
    assert {0, 2} <= set(kept)


def test_bn_scale_warns_where_there_is_no_norm() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.warns(UserWarning, match="no norm scales a channel"):
        channels("bn-scale", model, 0.3)


def test_group_norm_compares_within_families() -> None:
    model = conv_net()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # a layer's scale says nothing about its channels
        model[0].weight[3].zero_(), model[3].weight[:, 3].zero_()
    pruned = channels("group-norm", model, 0.3)
    assert 3 not in kept_channels(pruned, "0.weight")
    assert len(kept_channels(pruned, "0.weight")) >= 3
    magnitude = channels("magnitude", model, 0.3)
    assert len(kept_channels(magnitude, "0.weight")) < len(kept_channels(pruned, "0.weight"))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", ["magnitude", "taylor", "obd"])
def test_groups_of_a_kind_are_compared_within_families(method: str) -> None:
    """A layer of small weights, or small derivatives, keeps as many channels as its like."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), *(nn.Conv2d(12, 12, 3) for _ in range(3)), nn.Conv2d(12, 2, 1)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer, factor in zip(layers, (1, 1e-3, 1, 1e3, 1), strict=True):
            layer.weight.mul_(factor)
    x, y = torch.randn(8, 3, 9, 9), torch.randint(2, (8,))

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(out.mean((2, 3)), y)

    def widths(normalize: str, scope: str) -> list[int]:
        pruned = fxprune.apply(
            model, method, 0.5, granularity="channel", of="macs", scope=scope, normalize=normalize,
            example_inputs=x, data=(x, y), loss_fn=loss, progress=False,
        )  # fmt: skip
        return [int(fxprune.masks(pruned)[f"{i}.weight"].flatten(1).any(1).sum()) for i in range(4)]

    assert widths("method", "isomorphic") == widths("family", "isomorphic")
    assert widths("method", "global") == widths("none", "global")
    assert min(widths("method", "isomorphic")) > min(widths("none", "isomorphic"))


def test_group_norm_by_hand() -> None:
    # Groups of the hidden layer: squares of the row plus squares of the column.
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]))
        model[1].weight.copy_(torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.5, 1.0]]))
    pruned = fxprune.apply(
        model, "group-norm", 1 / 3, granularity="channel", example_inputs=torch.ones(1, 2), progress=False
    )
    assert kept_channels(pruned, "0.weight") == [0, 1]  # 10, 9.25 and 6
