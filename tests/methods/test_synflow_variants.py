"""SynFlow-L2 and LogSynFlow against numbers computed by hand, and against the network itself."""

import copy
import math

import pytest
import timm
import torch
from nets import NETS
from torch import nn

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem, Scores
from fxprune.paths.count import flow
from fxprune.sparsity.masks import total
from methods.problems import problem, toy_a

LOG2, LOG3 = math.log(2), math.log(3)


def asked(model: nn.Module, example: torch.Tensor, sparsity: float) -> Problem:
    return problem(model, sparsity, graph=lower(capture(model, example)))


@pytest.mark.parametrize("resolution", ["spatial", "channel"])
@pytest.mark.parametrize(
    ("method", "options", "first", "second", "total_flow"),
    [
        ("synflow-l2", {}, [[1, 1], [16, 4]], [[2, 20]], 22),
        ("synflow-l2", {"form": "linear"}, [[1, 1], [8, 4]], [[2, 10]], 22),
        ("logsynflow", {}, [[LOG2, LOG2], [2 * LOG3, LOG3]], [[LOG3, 2 * math.log(4)]], 1),
    ],
)
def test_toy_a(
    scored: list[Scores], method: str, options: dict[str, str], first: list[list[float]],
    second: list[list[float]], total_flow: float, resolution: str,
) -> None:  # fmt: skip
    question = asked(toy_a(), torch.zeros(2, 2), 0.5)
    masks = methods.get(method, rounds=1, resolution=resolution, **options).find(question)
    assert total(masks) == 3
    found = {name: total_flow * score for name, score in scored[0].items()}
    assert torch.allclose(found["0.weight"], torch.tensor(first).float(), rtol=1e-5)
    assert torch.allclose(found["2.weight"], torch.tensor(second).float(), rtol=1e-5)


def network_scores(net: nn.Module, example: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    """The definitions, on the eager network without biases and norms, in float64."""
    linear = copy.deepcopy(net).double().eval()
    for module in linear.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.BatchNorm2d, nn.ReLU)):
                setattr(module, name, nn.Identity())
    edges = {}
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            if parameter.dim() > 1:
                edges[name] = parameter
                parameter.copy_(parameter.square() if method == "synflow-l2" else parameter.abs())
            else:
                parameter.zero_()
    flow = linear(torch.ones_like(example[:1], dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(flow, list(edges.values()))
    scores = {}
    for (name, edge), gradient in zip(edges.items(), gradients, strict=True):
        logarithmic = edge * (1 + gradient).log()
        scores[name] = (edge * gradient / flow if method == "synflow-l2" else logarithmic).detach()
    return scores


@pytest.mark.parametrize("method", ["synflow-l2", "logsynflow"])
@pytest.mark.parametrize("name", ["conv_chain", "residual"])
def test_scores_are_those_of_the_network(scored: list[Scores], method: str, name: str) -> None:
    torch.manual_seed(0)
    net, example = NETS[name]()
    methods.get(method, rounds=1).find(asked(net, example, 0.5))
    for parameter, expected in network_scores(net, example, method).items():
        assert torch.allclose(scored[0][parameter].double(), expected, rtol=1e-4, atol=1e-9), parameter


@pytest.mark.parametrize("method", ["synflow-l2", "logsynflow"])
def test_layers_that_are_excluded_carry_flow(scored: list[Scores], method: str) -> None:
    question = asked(toy_a(), torch.zeros(2, 2), 0.5)
    only = {"0.weight": question.weights["0.weight"]}
    methods.get(method, rounds=1).find(problem(toy_a(), 0.5, graph=question.graph, only=only))
    methods.get(method, rounds=1).find(question)
    assert torch.allclose(scored[0]["0.weight"], scored[1]["0.weight"])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["synflow-l2", "logsynflow"])
def test_hundreds_of_layers_stay_finite(scored: list[Scores], method: str) -> None:
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(120)))
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.mul_(1e4)  # R is about 1e470, and 1e900 when squared
    question = asked(deep, torch.zeros(2, 8), 0.9)
    masks = methods.get(method, rounds=3).find(question)
    assert total(masks) == question.budget.total
    assert all(bool(score.isfinite().all()) for scores in scored for score in scores.values())


# The large ones have up to 86 million weights, which are drawn and scored three times.
LARGE = ("resnet50", "vit_base_patch16_224", "efficientnet_b7")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet26", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)
def test_trained_networks_stay_finite_in_float32(scored: list[Scores], name: str) -> None:
    """R is beyond float32, where published code gives inf, or NaN; for EfficientNet-B7 beyond float64 too."""
    torch.manual_seed(0)
    model = capture(timm.create_model(name))
    graph = lower(model)
    # Training leaves weights that are larger than those of a fresh network.
    weights = {parameter: 3 * model.get_parameter(parameter).detach() for parameter in graph.kernels}
    sizes = {parameter: weight.abs() for parameter, weight in weights.items()}
    log_total = flow(graph, sizes, resolution="channel", pool="mean").log_total
    assert log_total > math.log(torch.finfo(torch.float32).max)
    question = problem(model, 0.9, graph=graph, only=weights)
    for method in ("synflow", "synflow-l2", "logsynflow"):
        masks = methods.get(method, rounds=1, resolution="channel").find(question)
        assert total(masks) == question.budget.total
    assert len(scored) == 3
    for scores in scored:
        assert all(bool(score.isfinite().all()) for score in scores.values())
        assert all(bool(score.any()) for score in scores.values())
