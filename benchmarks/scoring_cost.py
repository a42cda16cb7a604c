"""Measure seconds and memory of a method's scores beside the plain passes that they are made of.

    python benchmarks/scoring_cost.py                                  # ResNet-50, 224 x 224, batch 16
    python benchmarks/scoring_cost.py px                               # one method alone
    python benchmarks/scoring_cost.py --model resnet18 --batch 8 --device cuda

A plain pass (forward, cross-entropy, backward) and the methods are taken in turns. A method's time of a round
is the difference of a run with several rounds and one with a single round, over the rounds between: capture
and everything else that is done once falls out. Targets: snip 1.10 x a pass; iter-snip and force 1.15 x a
pass per round; px 1.3 x (a forward and a pass) per round.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn
from torch.nn import functional as F

from fxprune import methods
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.sparsity.budget import plan
from fxprune.sparsity.masks import dense


def setting(name: str, batch: int, size: int, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).train()
    return model, torch.randn(batch, 3, size, size, device=device), torch.arange(batch, device=device)


def plain(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, backward: bool = True) -> None:
    """A pass, or its forward half."""
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        loss = F.cross_entropy(model(x), y)
    if backward:
        loss.backward()


def scorer(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, method: str, **options: Any
) -> Callable[[], None]:
    """The method's own part of a pruning, without capture and report."""
    gm = capture(model, x)
    graph = lower(gm)
    weights = {name: model.get_parameter(name).detach() for name in graph.kernels}
    # At a sparsity that one round survives: PX repairs branches that it emptied once, at the end.
    budget = plan("global", 0.5, {name: tuple(weight.shape) for name, weight in weights.items()})
    question = Problem(
        model=gm, weights=weights, masks=dense(weights), budget=budget, graph=graph,
        data=[(x, y)], device=x.device,
    )  # fmt: skip
    found = methods.resolve(method, **options)
    return lambda: void(found.find(copy.copy(question)))


def void(_: object) -> None:
    return None


def seconds(call: Callable[[], None], device: str) -> torch.Tensor:
    """Seconds on the clock, and seconds of this process on a CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter() - clock, time.process_time() - cpu], dtype=torch.float64)


def memory(what: str, name: str, batch: int, size: int) -> float:
    """Peak resident memory of a process of its own, in MB, beyond that of the model and the batch at rest."""
    code = (
        "import benchmarks_scoring_cost as b, resource, torch\n"
        f"model, x, y = b.setting({name!r}, {batch}, {size}, 'cpu')\n"
        + (
            "call = lambda: b.plain(model, x, y)\n"
            if what == "plain"
            else f"call = b.scorer(model, x, y, {what!r})\n"
        )
        + "call()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    ).replace("benchmarks_scoring_cost", "scoring_cost")
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0]
    )
    return float(out.stdout.split()[-1])


def main(
    names: Annotated[list[str] | None, typer.Argument(help="The methods; all of them by default.")] = None,
    model: str = "resnet50",
    batch: int = 16,
    size: int = 224,
    device: str = "cpu",
    rounds: int = 3,
    repeats: int = 3,
) -> None:
    """Prints a line per method."""
    warnings.simplefilter("ignore")
    net, x, y = setting(model, batch, size, device)
    print(f"{model}, {size} x {size}, batch {batch}, {device}, {torch.get_num_threads()} threads")
    plain(net, x, y)
    names = names or ["snip", "iter-snip", "force", "px"]
    single = {m: scorer(net, x, y, m, **({"rounds": 1} if m != "snip" else {})) for m in names}
    several = {m: scorer(net, x, y, m, rounds=1 + rounds) for m in names if m != "snip"}
    taken: dict[str, list[torch.Tensor]] = {}
    for _ in range(repeats):
        taken.setdefault("pass", []).append(seconds(lambda: plain(net, x, y), device))
        taken.setdefault("forward", []).append(seconds(lambda: plain(net, x, y, backward=False), device))
        if "snip" in single:
            taken.setdefault("snip", []).append(seconds(single["snip"], device))
        for name, call in several.items():
            one = seconds(single[name], device)
            taken.setdefault(name, []).append((seconds(call, device) - one) / rounds)
    found = {name: torch.stack(values).median(0).values for name, values in taken.items()}
    print(f"forward {found['forward'][0]:.2f} s, pass {found['pass'][0]:.2f} s")
    for name in names:
        base = found["pass"] + (found["forward"] if name == "px" else 0.0)
        clock, cpu = (found[name] / base).tolist()
        print(f"{name}: {found[name][0]:.2f} s a round, {clock:.2f} x, {cpu:.2f} x in CPU time", flush=True)
    if device == "cpu" and "snip" in names:
        peaks = {what: memory(what, model, batch, size) for what in ("plain", "snip", "grasp")}
        for what in ("snip", "grasp"):
            print(
                f"{what}: peak memory {peaks[what]:.0f} MB, {peaks[what] / peaks['plain']:.2f} x a plain pass"
            )


if __name__ == "__main__":
    typer.run(main)
