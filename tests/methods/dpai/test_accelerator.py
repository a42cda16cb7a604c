"""The step of DPaI for accelerators, on whatever device there is, against the one for CPUs."""

import math
from typing import Any

import pytest
import torch
from nets import NETS, WITHOUT_CIRCUIT, lowered_net
from thinning import one_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune
from fxprune import methods
from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.methods import dpai
from fxprune.methods.dpai.accelerator import DeviceAscent, top_k_mask
from fxprune.methods.dpai.adam_topk import Ascent
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import Objective
from fxprune.paths.circuit.compile import circuit
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import Masks, kept
from methods.dpai.selection import drawn, selected
from methods.problems import problem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WITH_CIRCUIT = [name for name in NETS if name not in WITHOUT_CIRCUIT]


def start(graph: ChannelGraph, sparsity: float) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Initial scores, and the budget of each layer."""
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.randn(own.shape, generator=generator).abs() for name, own in graph.kernels.items()}
    budget = plan("erk", sparsity, {name: tuple(own.shape) for name, own in graph.kernels.items()}).layers
    assert budget is not None
    return scores, budget


def ascent_on(device: str, graph: ChannelGraph, objective: Objective, sparsity: float = 0.8) -> DeviceAscent:
    found = circuit(graph)
    assert found is not None
    scores, budget = start(graph, sparsity)
    gradients = KernelGradients(found, list(graph.kernels), {}, objective, torch.device(device))
    return DeviceAscent(gradients, {name: score.to(device) for name, score in scores.items()}, budget, 0.005)


def ascent_of(graph: ChannelGraph, objective: Objective, sparsity: float = 0.8) -> Ascent:
    found = circuit(graph)
    assert found is not None
    return Ascent(KernelGradients(found, list(graph.kernels), {}, objective), *start(graph, sparsity), 0.005)


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "objective"),
    one_in(3, WITH_CIRCUIT, [Objective(0, 0), Objective(1, 0), Objective(0.9, 0.4)]),
)
def test_masks_are_those_of_the_ascent_for_cpus(name: str, objective: Objective, device: str) -> None:
    graph = lowered_net(name)
    there, here = ascent_on(device, graph, objective), ascent_of(graph, objective)
    for _ in range(4):
        figures, expected = there.measured_step(), here.measured_step()
        assert figures[1:] == expected[1:]
        assert figures.log_paths == pytest.approx(expected.log_paths, abs=1e-5)
        for _ in range(7):
            there.step()
            here.step()
    assert there.time == here.time == 32
    assert same(there.masks(), here.masks())


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_by_index(device: str) -> None:
    net = nn.Linear(4, 3, bias=False)
    found = circuit(lower(capture(net, torch.ones(1, 4))))
    assert found is not None
    scores = torch.tensor([[1.0, 2, 1, 1], [1, 3, 1, 1], [1, 1, 1, 1]])
    gradients = KernelGradients(found, ["weight"], {}, Objective(0, 0), torch.device(device))
    for number in range(13):
        ascent = DeviceAscent(gradients, {"weight": scores.to(device)}, {"weight": number}, 0.005)
        order = scores.flatten().argsort(descending=True, stable=True)[:number]
        expected = torch.zeros(12, dtype=torch.bool).index_fill_(0, order, True).view(3, 4)
        assert torch.equal(ascent.masks()["weight"].cpu(), expected)
        assert torch.equal(ascent.group.counts.cpu().view(3, 4) > 0, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_another_budget_half_way(device: str) -> None:
    graph = lowered_net("residual")
    there, here = (
        ascent_on(device, graph, Objective(0.5, 0.5), 0.5),
        ascent_of(graph, Objective(0.5, 0.5), 0.5),
    )
    for ascent in (there, here):
        ascent.figures()
        for _ in range(5):
            ascent.step()
        ascent.set_budget(start(graph, 0.9)[1])
        for _ in range(5):
            ascent.step()
    assert kept(there.masks()) == start(graph, 0.9)[1]
    assert same(there.masks(), here.masks())


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_first_path_is_looked_for(device: str) -> None:
    deep = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(10)))
    graph = lower(capture(deep, torch.ones(1, 12)))
    ascent = ascent_on(device, graph, Objective(0.5, 0.5), 1 - 40 / graph.prunable)
    assert ascent.measured_step().log_paths == -math.inf
    for _ in range(500):
        ascent.step()
    assert ascent.figures().log_paths > -math.inf


class NoWaiting(TorchDispatchMode):
    """Raises at whatever would make a host wait for its device, or differ from one call to the next."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.WAITS, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["conv_chain", "residual", "grouped", "dead_taps", "mlp"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    ascent = ascent_on("cpu", lowered_net(name), Objective(0.9, 0.5), 0.5)
    assert ascent.gradients.circuit.is_fixed
    ascent.measured_step()
    with NoWaiting():
        ascent.step()


def test_it_is_the_device_that_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step for accelerators serves every device but the CPU, from ``device=`` down."""
    torch.manual_seed(0)
    net, example = NETS["residual"]()
    graph = lower(capture(net, example))
    expected = methods.get("dpai", steps=30).find(problem(net, 0.8, graph=graph))

    made: list[DeviceAscent] = []

    def ascent(gradients: KernelGradients, magnitudes: Any, budget: Any, lr: float) -> DeviceAscent:
        made.append(DeviceAscent(gradients, magnitudes, budget, lr))
        return made[-1]

    monkeypatch.setattr(dpai, "DeviceAscent", ascent)
    asked = problem(net, 0.8, graph=graph)
    monkeypatch.setattr(dpai, "_is_host", lambda device: False)
    found = methods.get("dpai", steps=30).find(asked)
    assert len(made) == 1
    assert same(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_apply_on_a_gpu() -> None:
    net, example = NETS["residual"]()
    here = fxprune.apply(net, "dpai", 0.8, example_inputs=example, steps=60, progress=False)
    there = fxprune.apply(net, "dpai", 0.8, example_inputs=example, steps=60, progress=False, device="cuda")
    assert same(fxprune.masks(here), fxprune.masks(there))


@pytest.mark.parametrize("is_coarse", [False, True])
def test_the_mask_without_waiting_is_that_of_select(is_coarse: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = drawn(generator, (11, 3), 4, is_coarse)
    scores[2] = -torch.inf
    for number in range(31):
        assert torch.equal(top_k_mask(scores, number), selected({"a": scores}, {"a": number})["a"])
