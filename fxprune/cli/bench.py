"""The command ``bench``: measure the dense, the masked and the compact network side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fxprune
from fxprune.cli.folder import read_folder
from fxprune.cli.sources import load_network
from fxprune.progress import Display

RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")


def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|DIR", help="A model as for prune, or a folder that prune wrote."),
    ],
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes: --batch 1 8.")] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="eager, compile, onnxruntime, openvino; one or more.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; as many as PyTorch takes.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure each network, at least.")] = 2.0,
    method: Annotated[str, typer.Option("--method", "-m", help="Prunes a MODEL.")] = "magnitude",
    sparsity: Annotated[float, typer.Option("--sparsity", "-s", help="Of a MODEL, once pruned.")] = 0.5,
    granularity: Annotated[str, typer.Option(help="Of a MODEL's masks.")] = "channel",
    seed: Annotated[int, typer.Option(help="Decides a MODEL's initial weights.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a network dense, masked and compact: milliseconds, sizes, memory."""
    display = Display()
    with display.step(f"load {model}"):
        if Path(model).is_dir():
            networks, inputs, _ = read_folder(Path(model))
        else:
            dense, inputs = load_network(model, seed)
            networks = {"dense": dense}
    if "masked" not in networks:
        networks["masked"] = fxprune.apply(
            dense, method, sparsity, example_inputs=inputs, granularity=granularity, seed=seed
        )
    if "compact" not in networks:
        networks["compact"] = fxprune.compact(networks["masked"])
    found = fxprune.bench(
        networks,
        inputs,
        batch=batch or [1],
        runtimes=runtime or ["eager"],
        threads=threads,
        seconds=seconds,
    )
    typer.echo(found.to_json() if json_ else found)


def spread(words: list[str]) -> list[str]:
    """Repeat the flags ``--batch`` and ``--runtime`` before each of their values.

    >>> spread(["bench", "net.py:net", "--batch", "1", "8", "--json"])
    ['bench', 'net.py:net', '--batch', '1', '--batch', '8', '--json']
    """
    found: list[str] = []
    flag = ""
    for word in words:
        more = (flag == "--batch" and word.isdigit()) or (flag == "--runtime" and word in RUNTIMES)
        if more and found[-1] != flag:
            found.append(flag)
        elif not more and not (found and found[-1] == flag):
            flag = word if word in ("--batch", "--runtime") else ""
        found.append(word)
    return found
