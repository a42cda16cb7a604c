"""The commands ``analyze`` and ``graph``: show a network, or a folder that prune wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxprune
from fxprune.cli.flags import NETWORK, plain_flags, with_flags
from fxprune.cli.folder import REPORT, check_folder, read_folder
from fxprune.cli.sources import load_network
from fxprune.progress import Display

if TYPE_CHECKING:
    from fxprune.metrics import Report

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, zoo:NAME, hf:FOLDER, or path/to/file.py:factory; the factory"
        " returns the network, or a pair of it and example inputs.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Resolution = Annotated[str, typer.Option(help="spatial (exact) or channel (faster, an upper bound).")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with; as many as PyTorch takes.")]


def set_threads(number: int | None) -> None:
    """Compute with so many threads; ``ValueError`` for a number below 1."""
    if number is not None:
        import torch

        if number < 1:
            raise ValueError(f"--threads {number}: expected a number of at least 1")
        torch.set_num_threads(number)


def analyze(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|DIR", help="A model as for prune, or a folder that prune wrote."),
    ],
    resolution: Resolution = "spatial",
    html: Annotated[
        Path | None, typer.Option(help="File for a page with the masks of all layers, to look at.")
    ] = None,
    threads: Threads = None,
    json_: AsJson = False,
    **origin: Any,
) -> None:
    """Report on a network, dense or pruned: density, effective paths, nodes, kernels, multiply-adds."""
    if resolution not in ("spatial", "channel"):
        raise ValueError(f"--resolution {resolution}: expected spatial or channel")
    check_folder("--html", html)
    set_threads(threads)
    display = Display()
    with display.step(f"load {model}"):
        if Path(model).is_dir():
            networks, inputs, facts = read_folder(Path(model))
            network = networks["masked"]
        else:
            network, inputs = load_network(model, 0, **origin)
            facts = {"model": model}
    with display.step("analyze"):
        report = fxprune.analyze(network, resolution, example_inputs=inputs)  # type: ignore[arg-type]
    if html is not None:
        report.to_html(html, _notes(facts, Path(model)))
    typer.echo(as_json(report, facts) if json_ else report)


def _notes(facts: dict[str, Any], folder: Path) -> list[str]:
    """Say how a network was made and, for a folder of prune, what was measured of its compact form."""
    lines = [", ".join(f"{key}: {value}" for key, value in facts.items())]
    path = folder / REPORT
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("milliseconds", "bytes"):
        if key in known:
            values = (f"{name} {round(value, 3):,}" for name, value in known[key].items())
            lines.append(f"{key}: {', '.join(values)}")
    return lines


def graph(model: Model) -> None:
    """Show the channel and kernel graph that a network is lowered to."""
    display = Display()
    with display.step(f"capture {model}"):
        network, inputs = load_network(model, 0)
        captured = fxprune.capture(network, inputs)
    with display.step("lower"):
        lowered = fxprune.lower(captured)
    typer.echo(lowered.summary())


def as_json(report: Report, facts: dict[str, Any]) -> str:
    """Write facts and a report as JSON."""
    return json.dumps({**facts, **report.to_dict()}, indent=2)


def show_flags(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Give ``analyze`` the flags that say how a network is built."""
    with_flags(analyze, plain_flags(NETWORK))


show_flags((), {})
