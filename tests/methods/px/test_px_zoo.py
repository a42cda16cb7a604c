"""PX on the zoo's networks: against a second implementation in eager PyTorch, and round by round."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune import methods, zoo
from fxprune.methods import Problem, Scores
from fxprune.paths.count import reach
from fxprune.scoring import contract
from fxprune.sparsity.collapse import dead_layers
from fxprune.sparsity.masks import Masks, total
from methods.px.problems import activities, px_problem

F = nn.functional


def narrow_vgg19() -> nn.Module:
    """VGG-19 with an eighth of its channels."""
    return zoo._initialised(zoo._VGG([width // 8 for width in zoo.VGG19_WIDTHS], classes=100))


def narrow_resnet18() -> nn.Module:
    """The ResNet-18 of Tiny-ImageNet with an eighth of its channels."""
    return zoo._initialised(zoo._ResNet((8, 16, 32, 64), blocks=2, classes=200, has_bias=False))


def images(size: int, number: int = 4) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(2))


RELU = (torch.relu, F.relu)
POOL = (torch.max_pool2d, F.max_pool2d)


ZOO = pytest.mark.parametrize(
    ("make", "size"), [(zoo.resnet20, 32), (narrow_vgg19, 32), (narrow_resnet18, 32)]
)


class Noting(TorchFunctionMode):
    """Notes where ReLU passes, and which entries win in max-pools, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELU:
            self.patterns.append(args[0] > 0)
        if func in POOL:
            self.patterns.append(F.max_pool2d(args[0], 2, return_indices=True)[1])
        return func(*args, **(kwargs or {}))


class Following(TorchFunctionMode):
    """Multiplies by patterns that were noted in place of ReLU, and lets the entries that won there win."""

    def __init__(self, patterns: list[torch.Tensor]) -> None:
        super().__init__()
        self.patterns = iter(patterns)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELU:
            return args[0] * next(self.patterns)
        if func in POOL:
            winners = next(self.patterns)
            return args[0].flatten(2).gather(2, winners.flatten(2)).view(winners.shape)
        return func(*args, **(kwargs or {}))


def auxiliary(net: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The network in float64 with these weights, without biases; in eval mode, fresh norms are left out."""
    other = copy.deepcopy(net).double().eval()
    for name, module in list(other.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            other.set_submodule(name, nn.Identity())
    for name, parameter in other.named_parameters():
        parameter.data = weights[name].double() if name in weights else torch.zeros_like(parameter)
    return other


def by_the_formula(net: nn.Module, masks: Masks, x: torch.Tensor) -> tuple[torch.Tensor, Scores]:
    """g of every output, summed over samples, and the scores of the paper's equation 9, by autograd."""
    weights = {name: net.get_parameter(name).detach() * mask for name, mask in masks.items()}
    real = copy.deepcopy(net).eval()
    for name, weight in weights.items():
        real.get_parameter(name).data = weight
    with torch.no_grad(), Noting() as noting:
        real(x)
    with torch.no_grad(), Following(noting.patterns):
        g = auxiliary(net, dict(masks))(x.double().square()).sum(0)
    h = auxiliary(net, {name: weight.double().square() for name, weight in weights.items()})
    # Nothing is negative here: ReLU passes everything.
    (h(torch.ones(1, *x.shape[1:], dtype=torch.float64))[0] * g).sum().backward()
    return g, {name: h.get_parameter(name).grad * w.double().square() for name, w in weights.items()}


@pytest.mark.thinned(3)
@ZOO
def test_the_formula_in_eager_pytorch(make: Callable[[], nn.Module], size: int, scored: list[Scores]) -> None:
    torch.manual_seed(0)
    net = make()
    names = [name for name, parameter in net.named_parameters() if parameter.dim() > 1]
    masks = {name: torch.rand_like(net.get_parameter(name)) < 0.3 for name in names}
    x = images(size)
    asked = px_problem(net, (x, torch.zeros(len(x))), 0.9, masks)
    g, expected = by_the_formula(net, masks, x)
    assert len(g.unique()) > len(g) / 2, "a pruned classifier tells outputs apart"
    assert torch.allclose(activities(asked)[0], g, rtol=1e-5)
    methods.get("px", rounds=1).find(asked)
    # Scores are right up to one factor.
    whole = sum(float(score.sum()) for score in expected.values())
    found = sum(float(score.double().sum()) for score in scored[0].values())
    for name, score in expected.items():
        assert torch.allclose(scored[0][name].double() / found, score / whole, rtol=1e-5, atol=0), name


def on_active_paths(asked: Problem, masks: Masks) -> Masks:
    """The weights on a path to an output that some active path reaches."""
    (activity,) = activities(asked, masks)
    return reach(asked.graph, masks | {"fc.weight": masks["fc.weight"] & (activity > 0)[:, None]})


@ZOO
# A hundred rounds take ten seconds and more: each is compared with the weights on active paths.
@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 100])
def test_rounds(
    make: Callable[[], nn.Module], size: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    asked = px_problem(make(), (images(size), torch.zeros(4)), 0.982)
    select = contract.select
    rounds: list[bool] = []

    def checking(scores: Scores, *args: Any, within: Masks, **kwargs: Any) -> Masks:
        expected = on_active_paths(asked, within)
        rounds.append(all(torch.equal(score > 0, expected[name]) for name, score in scores.items()))
        return select(scores, *args, within=within, **kwargs)

    monkeypatch.setattr(contract, "select", checking)
    masks = methods.get("px", rounds=number).find(asked)
    assert rounds == [True] * number, "in float32, scores are positive on paths, and nowhere else"
    assert total(masks) == asked.budget.total
    assert not dead_layers(asked.graph, reach(asked.graph, masks))
