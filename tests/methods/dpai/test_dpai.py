"""DPaI against numbers computed by hand, a naive loop, the interpreter and the metrics."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from nets import NETS, lowered_net
from thinning import one_in
from torch import nn

import fxprune
from fxprune import methods, zoo
from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.dpai import adam_topk, layer_topk
from fxprune.methods.dpai.adam_topk import FLUSH_EVERY, LONGEST_STEP, Ascent
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import LARGEST, SMALLEST, Objective, ScoreGradients
from fxprune.methods.dpai.weight_gradients import WeightGradients
from fxprune.metrics import measure
from fxprune.paths.circuit import compile as circuits
from fxprune.paths.circuit.circuit import Circuit
from fxprune.paths.circuit.compile import circuit
from fxprune.paths.count import flow
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import Masks, is_subset, kept
from methods.problems import problem

KINDS = ["kernel", "weight"]
# One number per kernel will not do: positions differ, or a view is no view.
WITHOUT_CIRCUIT = {"transposed", "pixel_shuffle"}
OBJECTIVES = [Objective(0, 0), Objective(0.5, 0), Objective(1, 0), Objective(0.5, 1), Objective(0.5, 0.3)]


def stack(*layers: list[list[int]]) -> tuple[nn.Sequential, Masks]:
    """Linear layers without biases with these masks."""
    masks = [torch.tensor(layer).bool() for layer in layers]
    net = nn.Sequential(*(nn.Linear(mask.shape[1], mask.shape[0], bias=False) for mask in masks))
    return net, {f"{place}.weight": mask for place, mask in enumerate(masks)}


class Skip(nn.Module):
    """h = F1 x; y = F3 F2 h + h; out = F4 y, of widths 2-2-(2-2)-1."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2, self.f3, self.f4 = (nn.Linear(2, n, bias=False) for n in (2, 2, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.f1(x)
        return self.f4(self.f3(self.f2(h)) + h)


TOY_M = [[1, 1], [1, 0], [0, 0]], [[1, 1, 1], [0, 0, 1]], [[1, 1]]
TOY_R = {
    "f1.weight": [[1, 1], [1, 1]],
    "f2.weight": [[1, 1], [1, 0]],
    "f3.weight": [[0, 1], [0, 1]],
    "f4.weight": [[1, 1]],
}


def gradients_of(graph: ChannelGraph, objective: Objective, kind: str) -> ScoreGradients:
    if kind == "weight":
        return WeightGradients(graph, list(graph.kernels), {}, objective, "channel", torch.device("cpu"))
    found = circuit(graph)
    assert found is not None
    return KernelGradients(found, list(graph.kernels), {}, objective)


def ascent_at(
    graph: ChannelGraph, masks: Masks, objective: Objective, kind: str, lr: float = 0.005
) -> Ascent:
    """Scores 2 where the masks keep, 1 where they prune."""
    scores = {name: 1.0 + mask.float() for name, mask in masks.items()}
    return Ascent(gradients_of(graph, objective, kind), scores, kept(masks), lr)


def directions(ascent: Ascent) -> dict[str, torch.Tensor]:
    ascent.gradients.evaluate()
    found = {}
    for place, group in enumerate(ascent.groups):
        blocks = range(len(ascent.gradients.blocks(place)))
        whole = torch.cat([ascent.gradients.gradient(place, block).clone() for block in blocks])
        found |= {name: whole[where] for name, where in group.units.items()}
    return found


def assert_direction(masks: Masks, graph: ChannelGraph, kind: str, objective: Objective, *rows: Any) -> None:
    found = directions(ascent_at(graph, masks, objective, kind))
    for (name, direction), row in zip(found.items(), rows, strict=True):
        assert torch.allclose(direction, torch.tensor(row).flatten().float(), atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_toy_m(kind: str) -> None:
    net, masks = stack(*TOY_M)
    graph = lower(capture(net, torch.zeros(1, 2)))
    figures = ascent_at(graph, masks, Objective(0, 0), kind).figures()
    assert (round(math.exp(figures.log_paths), 5), figures.nodes, figures.kernels) == (3, 4, 6)
    third = 1 / 3
    paths = [third, third, third, third, 2 / 3, 2 / 3], [2 / 3, third, 0, 2 / 3, third, 0], [1.0, 0]
    nodes = [0, 0, 0, 0, 2 / 3, 2 / 3], [0, 0, 0, 2 / 3, third, 0], [0, 0]
    kernels = [0, 0, 0, third, 2 / 3, 2 / 3], [0, 0, 0, 2 / 3, third, 0], [0, 0]
    mixed = [1 / 6, 1 / 6, 1 / 6, 1 / 4, 2 / 3, 2 / 3], [third, 1 / 6, 0, 2 / 3, third, 0], [0.5, 0]
    assert_direction(masks, graph, kind, Objective(0, 0), *paths)
    assert_direction(masks, graph, kind, Objective(1, 0), *nodes)
    assert_direction(masks, graph, kind, Objective(1, 1), *kernels)
    assert_direction(masks, graph, kind, Objective(0.5, 0.5), *mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_adam_on_toy_m(kind: str) -> None:
    net, masks = stack(*TOY_M)
    graph = lower(capture(net, torch.zeros(1, 2)))
    ascent = ascent_at(graph, masks, Objective(1, 0), kind)
    assert ascent.step() == pytest.approx(math.log(3))
    rises = torch.cat([state.rise for state in ascent.states])
    assert torch.allclose(rises, 0.005 * torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_toy_r_counts_paths_beside_the_branch_once(kind: str) -> None:
    graph = lower(capture(Skip(), torch.zeros(1, 2)))
    ones = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in graph.kernels.items()}
    assert math.exp(ascent_at(graph, ones, Objective(0, 0), kind).figures().log_paths) == pytest.approx(20)
    masks = {name: torch.tensor(mask).bool() for name, mask in TOY_R.items()}
    figures = ascent_at(graph, masks, Objective(0, 0), kind).figures()
    assert math.exp(figures.log_paths) == pytest.approx(8)
    assert (figures.nodes, figures.kernels) == (6, 9)
    # Unit 0 of F2 has no way out: its incoming scores get nothing.
    assert_direction(
        masks, graph, kind, Objective(0, 0),
        [0.375, 0.375, 0.125, 0.125], [0, 0, 0.5, 0.5], [0.5, 0.25, 0.5, 0.25], [0.5, 0.5],
    )  # fmt: skip


def random_masks(graph: ChannelGraph, density: float, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(own.shape, generator=generator) < density for name, own in graph.kernels.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_circuit_counts_what_the_interpreter_counts(name: str) -> None:
    graph = lowered_net(name)
    found = circuit(graph)
    assert (found is None) == (name in WITHOUT_CIRCUIT)
    if found is None:
        return
    for density in (0.9, 0.3, 0.05):
        masks = random_masks(graph, density)
        expected = flow(
            graph, {n: m.double() for n, m in masks.items()}, resolution="channel", dtype=torch.float64
        )
        live = {n: m & graph.kernels[n].live_taps if m.dim() > 2 else m for n, m in masks.items()}
        counts = {n: m.flatten(2).sum(2).double() if m.dim() > 2 else m.double() for n, m in live.items()}
        result = found.run(counts)
        assert result.log_total == pytest.approx(expected.log_total, abs=1e-10)
        gradients = {n: torch.zeros_like(c) for n, c in counts.items()}
        for op, x, slope in zip(found.contractions, result.x, result.slope, strict=True):
            op.spread(slope, x, gradients[op.name], add=True)
        for n, gradient in expected.gradients.items():
            reference = gradient.flatten(2).amax(2) if gradient.dim() > 2 else gradient
            assert torch.allclose(gradients[n], reference, rtol=1e-9, atol=1e-12), n


@pytest.mark.parametrize("name", NETS)
def test_a_circuit_carries_flow_as_the_interpreter_does(name: str) -> None:
    """Average pooling averages, and products take the geometric mean, unless only one factor has paths."""
    graph = lowered_net(name)
    found = circuit(graph, pool="mean", products="mean")
    sums = circuit(graph)
    assert found is None or sums is not None
    generator = torch.Generator().manual_seed(1)
    sizes = {n: torch.rand(own.shape, generator=generator).double() for n, own in graph.kernels.items()}
    expected = flow(graph, sizes, resolution="channel", pool="mean", products="mean", dtype=torch.float64)
    if found is None:
        # That of ``"each"``, where there is one, would give something else.
        each = flow(graph, sizes, resolution="channel", pool="mean", dtype=torch.float64)
        assert sums is None or each.log_total != pytest.approx(expected.log_total, abs=1e-6)
        return
    live = {n: w * graph.kernels[n].live_taps if w.dim() > 2 else w for n, w in sizes.items()}
    result = found.run({n: w.flatten(2).sum(2) if w.dim() > 2 else w for n, w in live.items()})
    assert result.log_total == pytest.approx(expected.log_total, abs=1e-10)


def test_a_circuit_of_many_outputs_keeps_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their sum is beyond the band of a single value.
    wide = nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 4096))
    found = circuit(lower(capture(wide, torch.ones(4, 4))))
    assert found is not None
    counts = {name: found.dense(name) * 2.0**8 for name in found.kernels}
    calls = 0
    calibrate = Circuit._calibrate

    def counted(self: Circuit) -> None:
        nonlocal calls
        calls += 1
        calibrate(self)

    monkeypatch.setattr(Circuit, "_calibrate", counted)
    for _ in range(3):
        assert found.run(counts).log_total == pytest.approx(math.log(4 * 4096**2) + 16 * math.log(2))
    assert calls == 1


def test_a_circuit_of_any_depth() -> None:
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(400)))  # R = 64^401, about e^1668
    graph = lower(capture(deep, torch.ones(1, 64)))
    found = circuit(graph)
    assert found is not None
    result = found.run({name: found.dense(name) for name in found.kernels})
    assert result.log_total == pytest.approx(401 * math.log(64))
    op, x, slope = found.contractions[200], result.x[200], result.slope[200]
    gradient = torch.zeros(64, 64, dtype=torch.float64)
    op.spread(slope, x, gradient, add=False)
    assert torch.allclose(gradient, torch.full_like(gradient, 64.0**-2))
    # Thinned by far from one run to the next, and cut: no overflow, no NaN.
    thin = {name: torch.eye(64, dtype=torch.float64) for name in found.kernels}
    assert found.run(thin).log_total == pytest.approx(math.log(64))
    thin["7.weight"] = torch.zeros(64, 64, dtype=torch.float64)
    cut = found.run(thin)
    assert cut.log_total == -math.inf
    assert not any(bool(part.any()) for part in cut.slope)


class Uneven(nn.Module):
    """Branches side by side: at depths of 240, 120 and 1 each has e^300 times the next one's paths."""

    def __init__(self, depths: tuple[int, int, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(depth))) for depth in depths
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([self.branches[1](x), self.branches[2](x)], 1)
        return torch.cat([self.branches[0](x), inner], 1)


@pytest.mark.parametrize(
    ("name", "objective"),
    one_in(3, [name for name in NETS if name not in WITHOUT_CIRCUIT], OBJECTIVES),
)
def test_directions_are_those_of_single_weights(name: str, objective: Objective) -> None:
    graph = lowered_net(name)
    masks = random_masks(graph, 0.5)
    by_kernel, by_weight = (directions(ascent_at(graph, masks, objective, kind)) for kind in KINDS)
    for label, own in graph.kernels.items():
        units = by_kernel[label].unsqueeze(1)  # a kernel's weights share its direction
        found = units.expand(len(units), own.shape.numel() // len(units)).flatten()
        assert torch.allclose(found, by_weight[label], rtol=1e-4, atol=1e-9), label


def test_nodes_of_a_branch_with_far_fewer_paths_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tells the slopes of the last branch from zero; large networks are counted in float32."""
    monkeypatch.setattr(circuits, "WIDE", 0)
    graph = lower(capture(Uneven((240, 120, 1)), torch.ones(1, 16)))
    ones = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in graph.kernels.items()}
    figures = ascent_at(graph, ones, Objective(0.5, 0.5), "kernel").figures()
    assert figures.log_paths == pytest.approx(241 * math.log(16))
    assert (figures.nodes, figures.kernels) == (361 * 16, 361 * 16**2)


def test_what_is_known_to_be_moderate_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one weight per kernel are listed; that of a branch of few paths is not moderate."""
    monkeypatch.setattr(adam_topk, "GROUP_ENTRIES", 1)
    monkeypatch.setattr(layer_topk, "INDEX_RATIO", 1)
    graph = lower(capture(Uneven((16, 8, 1)), torch.ones(1, 16)))
    masks = {name: torch.rand(own.shape).argsort(1) < 15 for name, own in graph.kernels.items()}
    ascent = ascent_at(graph, masks, Objective(0.0, 0.0), "kernel")
    ascent.figures()
    known = []
    for place, direction in enumerate(directions(ascent).values()):
        assert ascent.groups[place].kept is not None
        known.append(ascent.gradients.is_in_range(place))
        is_moderate = (direction == 0) | ((direction > SMALLEST) & (direction < LARGEST))
        assert bool(is_moderate.all()) >= known[-1]
    assert known == [name != "branches.2.0.weight" for name in graph.kernels]


@pytest.mark.parametrize(
    ("name", "objective"),
    one_in(3, ["mlp", "attention", "mixer", "glu_free", "vit"], OBJECTIVES),
)
def test_layers_that_are_listed_end_as_those_that_are_not(
    name: str, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = lowered_net(name)
    found: list[tuple[Masks, dict[str, list[float]]]] = []
    for rare in (0, 1):
        asked = problem(nn.Identity(), 0.5, graph=graph, only=dense_weights(graph), seed=4)
        monkeypatch.setattr(layer_topk, "INDEX_RATIO", rare or 10**9)
        monkeypatch.setattr(adam_topk, "GROUP_ENTRIES", 1)
        alpha, beta = objective.alpha, objective.beta
        masks = methods.get("dpai", alpha=alpha, beta=beta, steps=40).find(asked)
        found.append((masks, asked.history))
    ascent = ascent_at(graph, found[1][0], objective, "kernel")
    ascent.figures()
    assert isinstance(ascent.gradients, KernelGradients)
    assert ascent.gradients.kept_lists
    (masks, history), (others, other_history) = found
    assert all(torch.equal(masks[label], others[label]) for label in masks)
    for column, values in history.items():
        assert other_history[column] == pytest.approx(values)


@pytest.mark.slow
@pytest.mark.parametrize("growth", [1.0, 1.05, 0.999 / 0.9, 1.2, 2.0, 1e3])
def test_no_step_is_longer_than_the_leap(growth: float) -> None:
    """The worst are gradients that grow as the weights of the two means part: these all but reach it."""
    score = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimiser = torch.optim.Adam([score], lr=0.25, maximize=True)
    longest = before = 0.0
    for step in range(4000 if growth < 1.15 else 200):
        power = step - 2000 if growth < 1.15 else step % 50
        score.grad = torch.tensor(growth**power, dtype=torch.float64)
        optimiser.step()
        longest, before = max(longest, float(score.detach()) - before), float(score.detach())
    assert longest <= 0.25 * LONGEST_STEP
    assert growth != 0.999 / 0.9 or longest > 0.99 * 0.25 * LONGEST_STEP


def naive_dpai(question: Problem, objective: Objective, steps: int, resolution: Any) -> Masks:
    """The algorithm word by word: signed scores, a sort in every step, torch's own Adam."""
    layers = plan("erk", 1 - question.budget.density, {n: tuple(m.shape) for n, m in question.masks.items()})
    assert layers.layers is not None
    scores = {
        name: torch.randn(mask.shape, generator=question.generator).requires_grad_()
        for name, mask in question.masks.items()
    }
    optimiser = torch.optim.Adam(scores.values(), lr=0.005, maximize=True)

    def chosen() -> Masks:
        masks = {}
        for name, score in scores.items():
            order = score.detach().abs().flatten().argsort(descending=True, stable=True)
            mask = torch.zeros(score.numel(), dtype=torch.bool)
            mask[order[: layers.layers[name]]] = True
            masks[name] = mask.view(score.shape)
        return masks

    for _ in range(steps):
        masks = chosen()
        ones = {name: mask.double() for name, mask in masks.items()}
        gradients = flow(question.graph, ones, resolution=resolution, dtype=torch.float64).gradients
        for name, score in scores.items():
            effective = (gradients[name] > 0) & masks[name]
            alive = effective.flatten(2).any(2) if effective.dim() > 2 else effective
            dead_nodes = ~alive.any(1, keepdim=True).expand(alive.shape)
            factor = (1 - objective.alpha) + objective.alpha * (
                (1 - objective.beta) * dead_nodes.double() + objective.beta * (~alive).double()
            )
            shaped = factor.view(*factor.shape, *[1] * (score.dim() - 2))
            score.grad = (score.detach().sign() * gradients[name] * shaped).float()
        optimiser.step()
    return chosen()


@pytest.mark.parametrize(
    ("resolution", "objective", "name"),
    one_in(
        3,
        ["channel", "spatial"],
        [Objective(0, 0), Objective(1, 0), Objective(1, 1), Objective(0.9, 0.3)],
        ["residual", "grouped", "dead_taps"],
    ),
)
def test_masks_are_those_of_the_naive_loop(resolution: str, objective: Objective, name: str) -> None:
    steps = FLUSH_EVERY + 10
    torch.manual_seed(0)
    model, example = NETS[name]()
    graph = lower(capture(model, example))
    asked = problem(model, 0.8, graph=graph, seed=4)
    once_more = problem(model, 0.8, graph=graph, seed=4)
    expected = naive_dpai(once_more, objective, steps, resolution)
    method = methods.get(
        "dpai", alpha=objective.alpha, beta=objective.beta, steps=steps, resolution=resolution
    )
    found = method.find(asked)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(("name", "resolution"), one_in(2, NETS, ["channel", "spatial"]))
def test_every_network_at_both_resolutions(name: str, resolution: Any) -> None:
    graph = lowered_net(name)
    asked = problem(nn.Identity(), 0.5, graph=graph, only=dense_weights(graph))
    found = methods.get("dpai", steps=12, resolution=resolution).find(asked)
    history = asked.history
    report = measure(graph, found, resolution)
    assert report.kept_params == asked.budget.total
    assert history["log_paths"][-1] == pytest.approx(report.log_paths, abs=1e-4)
    assert history["nodes"][-1] == report.effective_nodes
    assert history["kernels"][-1] == report.effective_kernels


def dense_weights(graph: ChannelGraph) -> dict[str, torch.Tensor]:
    return {name: torch.ones(own.shape) for name, own in graph.kernels.items()}


@pytest.fixture(scope="module")
def small() -> ChannelGraph:
    return lower(capture(zoo.resnet20(), torch.ones(1, 3, 32, 32)))


def ask(graph: ChannelGraph, kept_weights: int = 865, **fields: Any) -> Problem:
    return problem(nn.Identity(), 1 - kept_weights / graph.prunable, graph=graph, only=dense_weights(graph),
                   **fields)  # fmt: skip


def test_each_objective_grows(small: ChannelGraph) -> None:
    for options, column, least in (
        ({"alpha": 0.0}, "log_paths", 35),
        ({"alpha": 1.0, "beta": 0.0}, "nodes", 540),
        ({"alpha": 1.0, "beta": 1.0}, "kernels", 800),
    ):
        asked = ask(small)
        masks = methods.get("dpai", steps=400, **options).find(asked)
        report = measure(small, masks)
        figures = {
            "log_paths": report.log_paths,
            "nodes": report.effective_nodes,
            "kernels": report.effective_kernels,
        }
        assert report.kept_params == 865
        assert figures[column] > least
        assert asked.history[column][-1] > asked.history[column][0]


def test_weights_do_not_matter_and_seeds_do() -> None:
    torch.manual_seed(0)
    found = []
    for seed in (1, 1, 2):
        net, example = NETS["residual"]()  # drawn anew
        pruned = fxprune.apply(net, "dpai", 0.7, example_inputs=example, seed=seed, steps=30, progress=False)
        found.append(torch.cat([mask.flatten() for mask in fxprune.masks(pruned).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_budgets(small: ChannelGraph) -> None:
    sizes = {name: own.shape.numel() for name, own in small.kernels.items()}
    for budget in ("erk", "uniform", {"*": 0.99}):
        asked = ask(small, 2709, budget=budget)
        assert kept(methods.get("dpai", steps=2).find(asked)) == asked.budget.layers
    by_erk = kept(methods.get("dpai", steps=2).find(ask(small, 2709)))
    assert by_erk == ask(small, 2709, budget="erk").budget.layers
    printed = kept(methods.get("dpai", steps=2, allocation="equation15").find(ask(small, 27_090)))
    assert sum(printed.values()) == 27_090
    # Sparsities are in proportion to 1 - sum / product of dims, up to rounding.
    constants = [
        (1 - number / sizes[name]) / (1 - sum(small.kernels[name].shape) / sizes[name])
        for name, number in printed.items()
        if number < sizes[name]
    ]
    assert max(constants) - min(constants) < 2e-3


def test_pruned_weights_stay_pruned_and_excluded_layers_as_they_are() -> None:
    torch.manual_seed(0)
    net, example = NETS["residual"]()
    first = fxprune.apply(net, "dpai", 0.4, example_inputs=example, steps=20, progress=False)
    before = fxprune.masks(first)
    excluded = next(iter(before))
    again = fxprune.apply(
        first, "dpai", 0.75, example_inputs=example, exclude=excluded, steps=20, progress=False
    )
    after = fxprune.masks(again)
    assert is_subset(after, before)
    assert torch.equal(after[excluded], before[excluded])
    # The excluded layer counts with the masks it has.
    history = again.meta["fxprune"]["history"]
    paths = measure(lower(capture(net, example)), after, "channel").log_paths
    assert history["log_paths"][-1] == pytest.approx(paths, abs=1e-9)


def test_history_is_on_the_result() -> None:
    torch.manual_seed(0)
    net, example = NETS["conv_chain"]()
    pruned = fxprune.apply(net, "dpai", 0.6, example_inputs=example, steps=25, progress=False)
    history = pruned.meta["fxprune"]["history"]
    assert list(history) == ["step", "log_paths", "nodes", "kernels", "objective"]
    assert history["step"] == [0, 10, 20, 25]
    expected = 0.01 * history["log_paths"][-1] + 0.495 * math.log(
        history["nodes"][-1] * history["kernels"][-1]
    )
    assert history["objective"][-1] == pytest.approx(expected)


def test_it_stops_when_nothing_changes() -> None:
    torch.manual_seed(0)
    net, example = NETS["mlp"]()
    graph = lower(capture(net, example))
    steps = {}
    for tol in (1e6, 2e-3, 0.0):
        asked = problem(net, 0.5, graph=graph)
        methods.get("dpai", steps=700, tol=tol).find(asked)
        steps[tol] = asked.history["step"][-1]
    assert steps[1e6] == 600  # two stretches of 300 are compared
    assert steps[1e6] <= steps[2e-3] <= 700
    assert steps[0.0] == 700


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_first_path_is_found_where_the_random_masks_have_none(
    is_listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_listed:
        monkeypatch.setattr(layer_topk, "INDEX_RATIO", 1)
        monkeypatch.setattr(adam_topk, "GROUP_ENTRIES", 1)
    deep = nn.Sequential(*(nn.Linear(12, 12) for _ in range(10)))
    graph = lower(capture(deep, torch.ones(1, 12)))
    asked = problem(deep, 1 - 40 / graph.prunable, graph=graph, budget="uniform")
    masks = methods.get("dpai", steps=500, alpha=0.5, beta=0.5).find(asked)
    assert asked.history["log_paths"][0] == -math.inf
    assert measure(graph, masks).log_paths > -math.inf


@pytest.mark.parametrize("resolution", ["channel", "spatial"])
def test_no_path_is_a_warning_with_the_budget_it_takes(small: ChannelGraph, resolution: str) -> None:
    chain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    graph = lower(capture(chain, torch.ones(1, 6)))
    with pytest.warns(UserWarning, match=r"keeps 4 of 216 weights, .* takes 6 at least \(sparsity <= 0.972"):
        methods.get("dpai", steps=3, resolution=resolution).find(problem(chain, 1 - 4 / 216, graph=graph))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods.get("dpai", steps=3).find(ask(small))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, r"alpha=1.5, expected a number in \[0, 1\]"),
        ({"beta": -0.1}, r"beta=-0.1, expected a number in \[0, 1\]"),
        ({"alpha": math.nan}, r"alpha=nan"),
        ({"steps": 0}, "steps=0, expected an integer of at least 1"),
        ({"lr": 0.0}, "lr=0.0, expected a number above 0"),
        ({"tol": -1.0}, "tol=-1.0"),
        ({"resolution": "pixel"}, "resolution='pixel', expected one of 'channel', 'spatial'"),
        ({"allocation": "equation14"}, "allocation='equation14'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"method 'dpai': {words}"):
        methods.get("dpai", **options)


def test_inverting_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="has no scores to invert"):
        methods.get("dpai", invert=True)


def test_the_bar_shows_what_grows_and_an_interrupt_comes_through(small: ChannelGraph) -> None:
    said: list[str] = []

    def progress(steps: Iterable[Any], description: Any, total: int) -> Iterable[Any]:
        assert total == 6
        for place, step in enumerate(steps):
            if place == 3:
                raise KeyboardInterrupt
            yield step
            said.append(description())

    asked = ask(small, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        methods.get("dpai", steps=60).find(asked)
    assert len(said) == 3
    assert all(text.startswith("dpai: ln paths ") and text.endswith(" kernels") for text in said)
    assert all(bool(mask.all()) for mask in asked.masks.values())


@pytest.mark.filterwarnings("ignore:sparsity=0.7. more than the 0.5 of 2.4")
@pytest.mark.parametrize("granularity", ["kernel", "nm(2,4)", "block(2,2)"])
@pytest.mark.parametrize("schedule", [None, "linear(3)", "exponential(4)"])
def test_granularities_and_schedules(granularity: str, schedule: str | None) -> None:
    torch.manual_seed(0)
    net, example = NETS["conv_chain"]()
    pruned = fxprune.apply(
        net, "dpai", 0.7, example_inputs=example, granularity=granularity, schedule=schedule, steps=30,
        progress=False,
    )  # fmt: skip
    plain = fxprune.apply(net, "random", 0.7, example_inputs=example, budget="erk", granularity=granularity)
    masks = fxprune.masks(pruned)
    assert kept(masks) == kept(fxprune.masks(plain))
    if granularity == "kernel":
        convs = [mask.flatten(2) for mask in masks.values() if mask.dim() > 2]
        assert all(torch.equal(mask.any(2), mask.all(2)) for mask in convs)


def test_a_schedule_of_single_weights_reaches_the_budget(small: ChannelGraph) -> None:
    asked = ask(small, schedule="cubic(5)")
    masks = methods.get("dpai", steps=50).find(asked)
    assert sum(kept(masks).values()) == 865
    assert asked.history["kernels"][0] > 865  # denser at first
