"""The command ``groups``: list the channel groups of a network."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fxprune.cli.sources import load_network
from fxprune.grouping import channel_groups
from fxprune.progress import Display


def groups(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, or path/to/file.py:factory.")
    ],
    heads: Annotated[bool, typer.Option("--heads", help="Attention loses whole heads.")] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Module or pattern that is not pruned; may be repeated.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the channels that can only be removed together."""
    display = Display()
    with display.step(f"load {model}"):
        network, inputs = load_network(model, 0)
    with display.step("find channel groups"):
        table = channel_groups(network, inputs, whole_heads=heads, exclude=tuple(exclude or ()))
    typer.echo(json.dumps([asdict(group) for group in table], indent=2) if json_ else table)
