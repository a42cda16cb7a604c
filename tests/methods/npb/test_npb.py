"""NPB against an integer solver, and its incoming paths against the eager network."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

import fxprune
from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods.npb.assignment import most_paths, solve
from fxprune.methods.npb.layer_by_layer import decide
from fxprune.paths.count import reach
from fxprune.sparsity.masks import is_subset, kept
from methods.problems import problem

RANDOM = [
    # groups, inputs, outputs, budget, cap, least
    *(
        (1, i, o, n, k, m)
        for i, o, n in ((3, 4, 5), (4, 3, 9), (2, 5, 3))
        for k, m in ((1, 1), (3, 2), (9, 1))
    ),
    (2, 2, 3, 7, 2, 1),
    (3, 1, 2, 4, 3, 2),
    (2, 3, 2, 1, 2, 1),
    (1, 4, 4, 40, 3, 1),
]


def value(
    counts: torch.Tensor, paths: torch.Tensor, n: int, alpha: float, beta: float, cap: int, m: int
) -> float:
    """The programme's objective, from its formulas; C without its constant."""
    counts = counts.double()
    nodes = counts.sum(2).clamp(max=m).sum() + counts.sum(1).clamp(max=m).sum()
    size = paths.numel() + counts.shape[0] * counts.shape[2]
    taken = (paths.unsqueeze(2) * counts).sum() / most_paths(paths, counts.shape[2], n, cap)
    return float(alpha * nodes / size + (1 - alpha) * taken + beta * float((counts > 0).sum()) / n)


def optimum(paths: torch.Tensor, outputs: int, n: int, alpha: float, beta: float, cap: int, m: int) -> float:
    """The same optimum by HiGHS: variables M, kernel in use (y <= M), rows (u <= sum), columns (v <= sum)."""
    groups, inputs = paths.shape
    cells = list(itertools.product(range(groups), range(inputs), range(outputs)))
    rows = list(itertools.product(range(groups), range(inputs)))
    columns = list(itertools.product(range(groups), range(outputs)))
    number = 2 * len(cells) + len(rows) + len(columns)
    gain, upper = np.zeros(number), np.zeros(number)
    size, top = len(rows) + len(columns), most_paths(paths, outputs, n, cap)
    bounds: list[np.ndarray] = []
    for c, (g, i, _) in enumerate(cells):
        gain[c], upper[c] = (1 - alpha) * float(paths[g, i]) / top, cap
        gain[len(cells) + c], upper[len(cells) + c] = beta / n, 1
        bounds.append(np.zeros(number))
        bounds[-1][[len(cells) + c, c]] = 1, -1
    for r, which in enumerate([(g, i, None) for g, i in rows] + [(g, None, j) for g, j in columns]):
        place = 2 * len(cells) + r
        gain[place], upper[place] = alpha / size, m
        line = np.zeros(number)
        line[place] = 1
        for c, cell in enumerate(cells):
            if all(w is None or w == x for w, x in zip(which, cell, strict=True)):
                line[c] = -1
        bounds.append(line)
    budget = np.zeros(number)
    budget[: len(cells)] = 1
    found = milp(
        -gain,
        integrality=np.ones(number),
        bounds=Bounds(0, upper),
        constraints=[LinearConstraint(np.array(bounds), ub=0), LinearConstraint(budget, ub=n)],
    )
    assert found.success
    return float(-found.fun)


@pytest.mark.parametrize(("groups", "inputs", "outputs", "n", "cap", "least"), RANDOM)
@pytest.mark.parametrize(("alpha", "beta"), [(0.99, 0.001), (0.01, 1.0), (0.5, 0.1), (0.0, 0.0), (1.0, 0.0)])
def test_the_programme_is_solved_to_the_solvers_optimum(
    groups: int, inputs: int, outputs: int, n: int, cap: int, least: int, alpha: float, beta: float
) -> None:
    generator = torch.Generator().manual_seed(groups * 100 + inputs * 10 + n)
    paths = torch.randint(1, 9, (groups, inputs), generator=generator).double()
    counts = solve(paths, outputs, n, alpha=alpha, beta=beta, cap=cap, least=least, generator=generator)
    assert int(counts.sum()) == min(n, cap * groups * inputs * outputs)
    assert int(counts.max()) <= cap
    assert int(counts.min()) >= 0
    mine = value(counts, paths, n, alpha, beta, cap, least)
    assert mine == pytest.approx(optimum(paths, outputs, n, alpha, beta, cap, least), abs=1e-9)


def test_most_paths_of_a_budget_below_one_inputs_share() -> None:
    # The published code sums all inputs there and finds 11 (methods.md 3.13).
    assert most_paths(torch.tensor([[3.0, 1.0]]), 2, 1, 1) == 3


def test_the_optimum_switches_at_four_sevenths() -> None:
    def rows(alpha: float) -> list[int]:
        found = solve(torch.tensor([[3.0, 1.0]]), 2, 2, alpha=alpha, beta=0.0, cap=1)
        return found[0].sum(1).tolist()

    assert rows(4 / 7 - 1e-6) == [2, 0]
    assert rows(4 / 7 + 1e-6) == [1, 1]


def test_inputs_without_paths_come_last() -> None:
    counts = solve(torch.tensor([[0.0, 2.0]]), 2, 3, alpha=1.0, beta=0.0, cap=1)
    assert counts.tolist() == [[[1, 0], [1, 1]]] or counts[0].sum(1).tolist() == [1, 2]


def asked(net: str, sparsity: float, **fields: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    gm = capture(model, inputs)
    graph = lower(gm)
    only = {name: gm.get_parameter(name).detach() for name in graph.kernels}
    return model, inputs, problem(gm, sparsity, graph=graph, only=only, **fields)


@pytest.mark.parametrize("net", ["conv_chain", "residual", "projection", "dense", "strided", "transposed"])
def test_incoming_paths_are_those_of_the_eager_network(net: str) -> None:
    model, inputs, question = asked(net, 0.5)
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(w.shape, generator=generator) < 0.6 for n, w in question.weights.items()}
    seen: dict[str, torch.Tensor] = {}

    def choose(name: str, incoming: torch.Tensor) -> torch.Tensor:
        seen[name] = incoming
        return masks[name]

    decide(question.graph, choose)
    eager = copy.deepcopy(model).double().eval()
    arriving: dict[str, torch.Tensor] = {}
    for path, module in eager.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
        if f"{path}.weight" in masks:
            module.weight.data.copy_(masks[f"{path}.weight"])
            if module.bias is not None:
                module.bias.data.zero_()

            def hook(_: nn.Module, args: Any, path: str = path) -> None:
                arriving[f"{path}.weight"] = args[0][0].sum(dim=tuple(range(1, args[0].dim() - 1)))

            module.register_forward_pre_hook(hook)
    eager(torch.ones_like(inputs, dtype=torch.float64))
    assert seen.keys() == masks.keys() == arriving.keys()
    for name, incoming in seen.items():
        per_input = incoming if question.graph.kernels[name].transposed else incoming.transpose(0, 1)
        groups = question.graph.kernels[name].groups
        found = per_input.flatten(1)[:, 0] if groups == 1 else None
        if found is not None:
            expected = arriving[name] / arriving[name].max()
            assert torch.allclose(found, expected, atol=1e-12), name


def test_grouped_layers_and_views_get_the_paths_of_their_own_inputs() -> None:
    _, _, question = asked("depthwise", 0.0)
    seen: dict[str, torch.Tensor] = {}
    first = next(iter(question.weights))
    only_one = torch.zeros_like(question.weights[first], dtype=torch.bool)
    only_one[1] = True

    def choose(name: str, incoming: torch.Tensor) -> torch.Tensor:
        seen[name] = incoming
        return only_one if name == first else torch.ones_like(incoming)

    decide(question.graph, choose)
    depthwise = next(n for n, k in question.graph.kernels.items() if k.groups > 1)
    assert seen[depthwise].flatten(1)[:, 0].nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    "net", ["residual", "projection", "dense", "grouped", "excite_sigmoid", "vit", "mixer"]
)
@pytest.mark.parametrize("alpha", [0.01, 0.99])
def test_every_layer_keeps_its_budget_and_repair_only_helps(net: str, alpha: float) -> None:
    _, _, question = asked(net, 0.7, budget="erk")
    plain = methods.get("npb", alpha=alpha, repair=False).find(question)
    _, _, again = asked(net, 0.7, budget="erk")
    masks = methods.get("npb", alpha=alpha).find(again)
    assert kept(masks) == kept(plain) == question.budget.layers
    before, after = (reach(question.graph, found) for found in (plain, masks))
    assert is_subset(before, after)


def test_more_nodes_than_random_masks_and_no_weight_wasted() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in ((3, 16), (16, 16), (16, 16))]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10, bias=False))
    example = torch.ones(1, 3, 8, 8)
    nodes = {}
    for method in ("npb", "random"):
        pruned = fxprune.apply(
            net, method, 0.985, example_inputs=example, budget="erk", progress=False, on_collapse="repair"
        )
        report = fxprune.analyze(pruned, example_inputs=example)
        nodes[method] = report.effective_nodes
        if method == "npb":
            assert report.effective_params == report.kept_params
    assert nodes["npb"] > 1.3 * nodes["random"]


def test_weights_pruned_before_stay_pruned_and_the_largest_are_taken_inside_a_kernel() -> None:
    _, _, first = asked("conv_free", 0.0)
    generator = torch.Generator().manual_seed(2)
    start = {n: torch.rand(w.shape, generator=generator) < 0.6 for n, w in first.weights.items()}
    _, _, question = asked("conv_free", 0.7, masks=start)
    masks = methods.get("npb").find(question)
    assert is_subset(masks, start)
    assert sum(kept(masks).values()) == question.budget.total
    largest = methods.get("npb", inside="magnitude", repair=False).find(asked("conv_free", 0.7)[2])
    for name, mask in largest.items():
        size = question.weights[name].abs().flatten(2)
        chosen = mask.flatten(2)
        worst_in = size.where(chosen, torch.inf).amin(2)
        best_out = size.where(~chosen, -torch.inf).amax(2)
        assert bool((worst_in >= best_out)[chosen.any(2)].all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5, expected a number from 0 to 1"),
        ({"beta": -1.0}, "beta=-1.0, expected a number of at least 0"),
        ({"max_per_kernel": 0}, "max_per_kernel=0, expected an integer"),
        ({"min_per_node": 0}, "min_per_node=0, expected an integer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.get("npb", **options)
