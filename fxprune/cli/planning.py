"""The command ``plan``: say which channels would go, and write it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import fxprune
from fxprune.cli.channel_flags import channel_flags, split, take_threads
from fxprune.cli.data_sources import load_batches
from fxprune.cli.flags import DATA, NETWORK, method_flags, named_method, plain_flags, take, with_flags
from fxprune.cli.folder import check_folder
from fxprune.cli.hugging_face import folder_of, token_loss
from fxprune.cli.methods import FOLDER, read_entries
from fxprune.cli.pruning import Budget, Excluded, Rounds, choose_method, read_budget
from fxprune.cli.reports import AsJson, Model, set_threads
from fxprune.cli.sources import load_network
from fxprune.progress import Display


def plan(
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help="See `fxprune methods`.")] = "magnitude",
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Share to remove of what --of says; 0.5.")
    ] = None,
    budget: Budget = "global",
    granularity: Annotated[str, typer.Option(help="channel or head.")] = "channel",
    schedule: Rounds = None,
    exclude: Excluded = None,
    seed: Annotated[int, typer.Option(help="Decides the model's initial weights and the masks.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to score: cpu, cuda, cuda:1.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the plan, for `fxprune prune --plan`.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the trade-off, .png or .svg.")] = None,
    json_: AsJson = False,
    **options: Any,
) -> None:
    """Say which channels would go, layer by layer, and what that saves; nothing is changed."""
    origin, source, channel = take(options, NETWORK), take(options, DATA), split(options)
    given = {name: value for name, value in options.items() if value is not None}
    chosen = choose_method(method, given)
    check_folder("--out", out)
    check_folder("--plot", plot)
    set_threads(take_threads(channel))
    display = Display()
    with display.step(f"load {model}"):
        network, inputs = load_network(model, seed, **origin)
        batches = load_batches(model, network, inputs, seed, **source)
    found = fxprune.plan(
        network,
        chosen,
        sparsity,
        example_inputs=inputs,
        data=batches,
        loss_fn=token_loss(network) if folder_of(model) is not None else None,
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


def show_flags(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Give ``plan`` its flags; its help shows the options of the method that is named."""
    chosen = named_method(words, settings, "magnitude")
    shared = plain_flags({**NETWORK, **DATA})
    with_flags(plan, shared + channel_flags() + method_flags(read_entries(FOLDER), chosen))


show_flags((), {})
