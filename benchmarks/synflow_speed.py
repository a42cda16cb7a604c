"""Seconds that a hundred rounds of SynFlow take on a CPU, beside the naive loop.

    OMP_NUM_THREADS=1 python benchmarks/synflow_speed.py                   # ResNet-50 to 90 %
    OMP_NUM_THREADS=2 python benchmarks/synflow_speed.py --methods synflow,synflow-l2,logsynflow
    python benchmarks/synflow_speed.py --model vit_base_patch16_224 --resolution channel --naive 0

Capture and lowering fall out: what is timed is ``Method.find``. The naive loop scores all weights by
automatic differentiation and sorts all scores, in every round; it is timed over a few rounds of the same
schedule, and its seconds are for a hundred. Both are given as wall time and as the processor time of all
threads, which a machine that is shared with other work disturbs less. Memory is the growth of the process's
peak during ``find``, in units of the weights (float32): all of it for the first method, what is more for the
next ones.

ResNet-50 to 90 %, channel resolution, an EPYC of two cores that other work kept busy, processor seconds of
one thread: SynFlow 7.2 to 9.2 (7.3 of wall time, when a core was free), SynFlow-L2 8.7, LogSynFlow 29; the
naive loop 312. Memory: 2.4 x the weights. With two threads 8.8 processor seconds in all
(OMP_WAIT_POLICY=passive; threads that spin while others hold the cores waste any amount of time).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
import typer

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.paths.count import flow
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import dense, total
from fxprune.sparsity.schedule import Exponential

ROUNDS = 100


def asked(name: str, sparsity: float) -> Problem:
    torch.manual_seed(0)
    model = capture(timm.create_model(name))
    graph = lower(model)
    weights = {name: model.get_parameter(name).detach() for name in graph.kernels}
    budget = plan("global", sparsity, {name: tuple(weight.shape) for name, weight in weights.items()})
    return Problem(model=model, graph=graph, weights=weights, masks=dense(weights), budget=budget)


def naive_round(problem: Problem, resolution: str, masks: dict[str, torch.Tensor], number: int) -> None:
    """One round of the definition, in place."""
    alive = {name: weight.abs() * masks[name] for name, weight in problem.weights.items()}
    found = flow(problem.graph, alive, resolution=resolution, pool="mean", products="mean")
    scores = torch.cat([(found.gradients[name] * weight).flatten() for name, weight in alive.items()])
    scores[~torch.cat([mask.flatten() for mask in masks.values()])] = -1
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:number]] = True
    for mask, part in zip(masks.values(), chosen.split([m.numel() for m in masks.values()]), strict=True):
        mask.copy_(part.view(mask.shape))


def naive(problem: Problem, resolution: str, rounds: int) -> None:
    """``rounds`` rounds out of a hundred, spread over all densities."""
    size = sum(problem.budget.sizes.values())
    schedule, masks = Exponential(ROUNDS), dense(problem.weights)
    for t in range(rounds):
        at = 1 + (ROUNDS - 1) * t // max(1, rounds - 1)
        naive_round(problem, resolution, masks, int(size * schedule.density(at, problem.budget.density)))


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak() -> int:
    """Of the process's memory, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(
    model: str = "resnet50",
    methods_: str = typer.Option("synflow", "--methods"),
    sparsity: float = 0.9,
    resolution: str = "channel",
    repeats: int = 3,
    naive_rounds: int = typer.Option(3, "--naive"),
) -> None:
    """Prints one line per method, and one for the naive loop of SynFlow."""
    problem = asked(model, sparsity)
    size = sum(problem.budget.sizes.values())
    print(f"{model}: {size / 1e6:.1f} million weights, {torch.get_num_threads()} thread(s), {ROUNDS} rounds")
    print(f"{'':12} {'wall s':>8} {'cpu s':>8} {'memory':>8}")
    for name in methods_.split(","):
        find = methods.get(name, rounds=ROUNDS, resolution=resolution).find
        before = peak()

        def run(find: Callable[[Problem], dict[str, torch.Tensor]] = find) -> None:
            assert total(find(problem)) == problem.budget.total

        times = [timed(run) for _ in range(repeats)]
        memory = (peak() - before) / (4 * size)
        wall, cpu = (median(column) for column in zip(*times, strict=True))
        print(f"{name:12} {wall:8.1f} {cpu:8.1f} {memory:8.1f}", flush=True)
    if naive_rounds:
        wall, cpu = timed(lambda: naive(problem, resolution, naive_rounds))
        print(f"{'naive':12} {wall * ROUNDS / naive_rounds:8.1f} {cpu * ROUNDS / naive_rounds:8.1f}")


if __name__ == "__main__":
    typer.run(main)
