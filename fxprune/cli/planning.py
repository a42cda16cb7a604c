"""The command ``plan``: say which channels would go, and write it down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli.channel_flags import split
from fxprune.cli.pruning import (
    AsJson,
    Budget,
    Data,
    Excluded,
    Model,
    Rounds,
    read_budget,
    read_values,
    register,
)
from fxprune.cli.sources import load_data, load_network
from fxprune.progress import Display


def plan(
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help="See `fxprune methods`.")] = "magnitude",
    sparsity: Annotated[
        float, typer.Option("--sparsity", "-s", help="Share to remove of what --of says, in [0, 1).")
    ] = 0.5,
    budget: Budget = "global",
    granularity: Annotated[str, typer.Option(help="channel or head.")] = "channel",
    schedule: Rounds = None,
    exclude: Excluded = None,
    seed: Annotated[int, typer.Option(help="Decides the model's initial weights and the masks.")] = 0,
    data: Data = None,
    device: Annotated[str | None, typer.Option(help="Where to score: cpu, cuda, cuda:1.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the plan, for `fxprune prune --plan`.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the trade-off, .png or .svg.")] = None,
    json_: AsJson = False,
    **options: Any,
) -> None:
    """Say which channels would go, layer by layer, and what that saves; nothing is changed."""
    channel = split(options)
    given = {name: value for name, value in options.items() if value is not None}
    chosen = fxprune.methods.resolve(method, **read_values(method, given))
    display = Display()
    with display.step(f"load {model}"):
        network, inputs = load_network(model, seed)
    found = fxprune.plan(
        network,
        chosen,
        sparsity,
        example_inputs=inputs,
        data=None if data is None else load_data(data),
        budget=read_budget(budget),
        granularity=granularity,
        **channel,
        schedule=schedule,
        exclude=tuple(exclude or ()),
        seed=seed,
        device=device,
    )
    if out is not None:
        found.save(out)
    if plot is not None:
        found.plot().savefig(plot)
    typer.echo(found.to_json() if json_ else found)


register(plan)
