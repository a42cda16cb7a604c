"""Time and memory of a step of DPaI, beside the same algorithm run on the network itself.

    OMP_NUM_THREADS=1 python benchmarks/dpai_speed.py [--nets resnet20 vit_base_patch16_224] [--out FILE]
    python benchmarks/dpai_speed.py --nets vgg19_bn --alone --course 3000       # the whole way
    python benchmarks/dpai_speed.py --nets vgg19_bn --alone --device cuda       # the captured step

"network" is what published code does: a forward and a backward pass of the network with its masks for
weights, a sort per layer, torch's Adam on every weight. One thread; the median over steps, and the fastest
tenth, which a machine that is shared with other work disturbs less. Steps are dearer where many weights
change sides, so that ``--course`` goes all the way and gives the mean. Memory is how far the process's
peak rises above what it holds before the optimiser is built, in units of the weights (float32); a small
network has gone before, as torch takes 17 MB for itself once.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.func import functional_call

import fxprune
from fxprune import zoo
from fxprune.methods.dpai import LAUNCH
from fxprune.methods.dpai.accelerator import DeviceAscent
from fxprune.methods.dpai.adam_topk import Ascent
from fxprune.methods.dpai.kernel_gradients import KernelGradients
from fxprune.methods.dpai.objective import Objective
from fxprune.paths.circuit.compile import circuit
from fxprune.sparsity.budget import plan

ZOO = {
    "resnet20": (zoo.resnet20, 32),
    "resnet18_tiny": (zoo.resnet18_tiny, 64),
    "vgg19_bn": (zoo.vgg19_bn, 32),
}
OBJECTIVE = Objective(0.99, 0.5)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name in ZOO:
        make, size = ZOO[name]
        return make().eval(), torch.ones(1, 3, size, size)
    net = timm.create_model(name).eval()
    return net, torch.ones(1, *net.pretrained_cfg["input_size"])


def timed(step: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Milliseconds per call over about ``seconds``, after two calls to warm up."""
    step()
    step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "fast": sorted(times)[len(times) // 10], "steps": len(times)}


def network_step(net: nn.Module, images: torch.Tensor, budget: dict[str, int]) -> Callable[[], None]:
    """The algorithm on the network: everything per weight, everything through autograd."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.BatchNorm2d, nn.LayerNorm, nn.ReLU, nn.GELU, nn.SiLU)):
                setattr(module, name, nn.Identity())
    scores = {name: torch.randn(net.get_parameter(name).shape).requires_grad_() for name in budget}
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters() if name not in budget}
    optimiser = torch.optim.Adam(scores.values(), lr=0.005)

    def step() -> None:
        masks = {}
        for name, score in scores.items():
            order = score.detach().abs().flatten().argsort()
            mask = torch.ones(score.numel())
            mask[order[: score.numel() - budget[name]]] = 0
            masks[name] = mask.view(score.shape).requires_grad_()
        paths = functional_call(net, {**zeros, **masks}, (images,)).sum()
        gradients = torch.autograd.grad(paths, list(masks.values()))
        for (name, score), gradient in zip(scores.items(), gradients, strict=True):
            alive = ((gradient * masks[name].detach()) > 0).flatten(2 if score.dim() > 2 else 1)
            kernels = alive.any(-1) if score.dim() > 2 else alive
            factor = 0.01 + 0.495 * (~kernels.any(1, keepdim=True)) + 0.495 * (~kernels)
            shaped = factor.view(*factor.shape, *[1] * (score.dim() - 2))
            score.grad = -gradient * score.detach().sign() * shaped / paths.detach().clamp(min=1e-30)
        optimiser.step()

    return step


def circuit_step(
    net: nn.Module, images: torch.Tensor, density: float, device: str
) -> tuple[Callable[[], Any], dict[str, int]]:
    graph = fxprune.lower(fxprune.capture(net, images))
    shapes = {name: tuple(kernels.shape) for name, kernels in graph.kernels.items()}
    budget = plan("erk", 1 - density, shapes).layers
    found = circuit(graph)
    assert found is not None
    assert budget is not None
    scores = {name: torch.randn(shape).abs_() for name, shape in shapes.items()}
    if device == "cpu":
        return Ascent(KernelGradients(found, list(shapes), {}, OBJECTIVE), scores, budget, 0.005).step, budget
    gradients = KernelGradients(found, list(shapes), {}, OBJECTIVE, torch.device(device), LAUNCH)
    there = {name: score.to(device) for name, score in scores.items()}
    ascent = DeviceAscent(gradients, there, budget, 0.005)
    ascent.measured_step()

    def step() -> None:
        ascent.step()
        torch.accelerator.synchronize()

    return step, budget


def peak() -> float:
    """Bytes, the most that this process has held since the last :func:`forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """The peak is what the process holds now, where the system has a way to say so."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def warm_up() -> None:
    """A few steps on a small network."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    step, _ = circuit_step(net.eval(), torch.ones(1, 3, 8, 8), 0.1, "cpu")
    for _ in range(10):
        step()


def course(step: Callable[[], Any], steps: int) -> float:
    """Milliseconds per step over so many."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return 1e3 * (time.perf_counter() - start) / steps


def measure(
    name: str, density: float, seconds: float, steps: int, with_network: bool, device: str
) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        warm_up()
    net, images = build(name)
    gc.collect()
    forget_peak()
    before = peak()
    with torch.no_grad():
        step, budget = circuit_step(net, images, density, device)
        row: dict[str, Any] = {"net": name, "weights": sum(net.get_parameter(n).numel() for n in budget)}
        row["circuit"] = timed(step, seconds)
        row["memory"] = (peak() - before) / (4 * row["weights"])
        if steps:
            step, _ = circuit_step(net, images, density, device)
            row["course"] = course(step, steps)
    del step
    if with_network:
        row["network"] = timed(network_step(net, images, budget), seconds)
        row["ratio"] = row["network"]["median"] / row["circuit"]["median"]
        row["ratio_fast"] = row["network"]["fast"] / row["circuit"]["fast"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=["resnet20", "resnet18_tiny", "vgg19_bn"])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--course", type=int, default=0, metavar="STEPS")
    parser.add_argument("--alone", action="store_true", help="leave the network out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    wish = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    heads = f"{'ms/step':>9} {'fast':>9} {'memory':>7} {'network':>10} {'ratio':>6} {'fast':>6}"
    print(f"{'net':24} {'weights':>12} {heads}")
    for name in wish.nets:
        row = measure(name, wish.density, wish.seconds, wish.course, not wish.alone, wish.device)
        rows.append(row)
        line = f"{name:24} {row['weights']:12,} {row['circuit']['median']:9.2f} {row['circuit']['fast']:9.2f}"
        line += f" {row['memory']:7.1f}"
        if "course" in row:
            line += f"   {row['course']:.2f} over {wish.course} steps"
        if "network" in row:
            line += f" {row['network']['median']:10.1f} {row['ratio']:6.0f} {row['ratio_fast']:6.0f}"
        print(line, flush=True)
    if wish.out:
        wish.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
