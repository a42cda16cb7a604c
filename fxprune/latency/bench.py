"""Measure networks side by side: times in turn, so that other work slows all alike; sizes and memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch import fx, nn

from fxprune.capture import capture
from fxprune.capture.inputs import example_inputs_for
from fxprune.capture.module import CapturedModule
from fxprune.channels.counts import dense_macs
from fxprune.keywords import refuse_unknown
from fxprune.latency.memory import peak_bytes
from fxprune.latency.results import Bench, Measured, Timing
from fxprune.latency.runtimes import RUNTIMES, missing_package, prepare
from fxprune.lowering import lower
from fxprune.progress import Display
from fxprune.rewrite.files.archive import save
from fxprune.rewrite.files.export import drawn_arguments
from fxprune.rewrite.masking.finalize import plain
from fxprune.rewrite.masking.parameters import unwrap
from fxprune.torch_private import pytree

__all__ = ["bench", "evaluating", "measure", "run_in_turn"]

WARM_UPS = 2
LEAST, MOST = 7, 300
"""Runs of each network."""


def bench(
    models: Mapping[str, nn.Module],
    example_inputs: Any = None,
    *,
    batch: int | Sequence[int] = (1,),
    runtimes: str | Sequence[str] = ("eager",),
    threads: int | None = None,
    seconds: float = 1.0,
    progress: bool = True,
    **others: NoReturn,
) -> Bench:
    """Measure the latency of networks, in turn, with their sizes and the memory that they take.

    Args:
        models: by name, networks that take the same inputs; they are not changed. The first is the one that
            others are compared with.
        example_inputs: as in :func:`fxprune.apply`; numbers are drawn in their shapes. By default those that
            the first of the graphs of :func:`fxprune.apply` was captured with, else what the first network
            takes that says so.
        batch: a batch size, or several.
        runtimes: "eager", "compile", "onnxruntime", "openvino". One that is not installed is skipped, and
            said to be.
        threads: of each runtime; by default as many as PyTorch has now.
        seconds: how long each network is measured in each runtime, at least; 7 to 300 runs.
        progress: say on stderr what goes on, once it takes over a second.

    Returns:
        A :class:`fxprune.latency.Bench`: times in milliseconds; ``print`` shows medians and quartiles.

    Raises:
        TypeError, ValueError: there is no network, or a batch size, a runtime or a number that is none,
            or there is no such argument.

    >>> small, large = nn.Linear(4, 4), nn.Linear(4, 400)
    >>> found = bench({"large": large, "small": small}, torch.ones(2, 4), seconds=0.01)
    >>> found.networks["small"].parameters, found.timing("small").batch
    (20, 1)
    """
    refuse_unknown(bench, others)
    batch = (batch,) if isinstance(batch, int) else batch
    runtimes = (runtimes,) if isinstance(runtimes, str) else runtimes
    _check(models, batch, runtimes, threads, seconds)
    threads = threads or torch.get_num_threads()
    first = unwrap(next(iter(models.values())))
    example_inputs = _known_inputs(models, example_inputs)
    given = example_inputs_for(first, example_inputs)
    skipped: dict[str, str] = {}
    for runtime in runtimes:
        package = missing_package(runtime)
        if package is not None:
            skipped[runtime] = f"not measured, as {package} is not installed; pip install {package}"
    calls = {size: drawn_arguments(given, first, size) for size in batch}
    with evaluating(models.values(), threads), tempfile.TemporaryDirectory() as folder:
        shown = Display(enabled=progress)(models.items(), "bench: sizes and memory", len(models))
        networks = {name: _described(model, given, calls, Path(folder)) for name, model in shown}
    present = [runtime for runtime in runtimes if runtime not in skipped]
    timings = measure(models, example_inputs, batch=batch, runtimes=present, threads=threads, seconds=seconds,
                      progress=progress)  # fmt: skip
    device = next((p.device for p in first.parameters()), torch.device("cpu"))
    return Bench(networks, timings, str(device), threads, skipped)


def measure(
    models: Mapping[str, nn.Module],
    example_inputs: Any = None,
    *,
    batch: Sequence[int] = (1,),
    runtimes: Sequence[str] = ("eager",),
    threads: int | None = None,
    seconds: float = 1.0,
    progress: bool = False,
) -> list[Timing]:
    """Measure times alone, in milliseconds; arguments as for :func:`bench`."""
    _check(models, batch, runtimes, threads, seconds)
    threads = threads or torch.get_num_threads()
    first = unwrap(next(iter(models.values())))
    example_inputs = _known_inputs(models, example_inputs)
    given = example_inputs_for(first, example_inputs)
    device = next((p.device for p in first.parameters()), torch.device("cpu"))
    timings: list[Timing] = []
    with evaluating(models.values(), threads), tempfile.TemporaryDirectory() as folder:
        wanted = [(runtime, size) for runtime in runtimes for size in batch]
        for runtime, size in Display(enabled=progress)(wanted, "bench: times", len(wanted)):
            call = drawn_arguments(given, first, size)
            runs = {
                name: prepare(runtime, model, example_inputs, call, threads, Path(folder))
                for name, model in models.items()
            }
            times = run_in_turn(runs, seconds, device)
            timings += [Timing(name, runtime, size, found) for name, found in times.items()]
    return timings


def _known_inputs(models: Mapping[str, nn.Module], example_inputs: Any) -> Any:
    """Return the example inputs, where there are none those of the first graph, or of a network that says."""
    if example_inputs is not None:
        return example_inputs
    # What a graph was captured with was chosen by somebody; what other networks say is only usual.
    for model in sorted(
        map(unwrap, models.values()), key=lambda inner: not isinstance(inner, CapturedModule)
    ):
        try:
            args, kwargs = example_inputs_for(model)
        except ValueError:
            continue
        return args or kwargs
    return None


def _check(
    models: Any, batch: Sequence[int], runtimes: Sequence[str], threads: int | None, seconds: float
) -> None:
    if isinstance(models, nn.Module):
        raise TypeError(
            f'models: got a {type(models).__name__}, expected a dict of networks: {{"model": model}}'
        )
    if not isinstance(models, Mapping):
        raise TypeError(f"models: got a {type(models).__name__}, expected a dict of networks by name")
    if not models:
        raise ValueError("models={}: expected a dict of at least one network by name")
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"models[{name!r}]: expected a torch.nn.Module, got a {type(model).__name__}")
    for size in batch:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"batch: {size!r} is no batch size; expected numbers from 1")
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise ValueError(f"runtimes: {runtime!r} is unknown; expected some of {', '.join(RUNTIMES)}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads={threads!r}: expected a number from 1")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: expected a number above 0")


@contextmanager
def evaluating(models: Any, threads: int) -> Iterator[None]:
    """Evaluation mode without gradients, on so many threads; afterwards all is as it was."""
    before = torch.get_num_threads()
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        torch.set_num_threads(threads)
        for module, _ in modes:
            module.training = False
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        for module, mode in modes:
            module.training = mode


def _described(model: nn.Module, given: Any, calls: Mapping[int, Any], folder: Path) -> Measured:
    """Count a network's parameters, multiply-adds, and bytes on disk and in memory."""
    source = plain(unwrap(model))
    gm: fx.GraphModule = source if _fits(source, given) else capture(source, given[0] or given[1])
    file = folder / "network.safetensors"
    save(model, file)
    graph = lower(gm)
    return Measured(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(dense_macs(op, graph.samples) for op in graph.ops),
        file_bytes=file.stat().st_size,
        peak_bytes={
            size: peak_bytes(model, partial(model, *args, **kwargs)) for size, (args, kwargs) in calls.items()
        },
    )


def _fits(source: nn.Module, given: Any) -> TypeGuard[CapturedModule]:
    """Whether a network is a graph whose shapes are those of the given inputs, but for the batch."""
    if not isinstance(source, CapturedModule) or not all("val" in node.meta for node in source.graph.nodes):
        return False
    own, asked = (
        [value.shape[1:] for value in pytree.tree_leaves(inputs) if isinstance(value, torch.Tensor)]
        for inputs in (example_inputs_for(source), given)
    )
    return own == asked


def run_in_turn(
    runs: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Run each function in turn until every one has had its time; milliseconds by name."""
    for run in runs.values():
        for _ in range(WARM_UPS):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(MOST):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            found[name].append(1e3 * (time.perf_counter() - start))
        if number + 1 >= LEAST and min(map(sum, found.values())) >= 1e3 * seconds:
            break
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
