"""The command ``export``: write a network, or one that prune wrote, for other runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxprune
from fxprune.cli.flags import NETWORK, plain_flags, with_flags
from fxprune.cli.folder import check_export, read_file, read_folder
from fxprune.cli.sources import load_network
from fxprune.progress import Display

if TYPE_CHECKING:
    from torch import nn

FORMS = ("compact", "masked", "dense")


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|DIR|FILE",
            help="A model as for prune, or a folder that prune wrote, or a file in it.",
        ),
    ],
    files: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Files to write, .onnx or .pt2; one or more.")
    ],
    form: Annotated[
        str | None, typer.Option(help="Of a DIR: compact (where it is there), masked or dense.")
    ] = None,
    **origin: Any,
) -> None:
    """Write a network, or what prune wrote, as .onnx or .pt2; run and compared when written."""
    for path in files:
        check_export(path, "OUT")
    with Display().step(f"load {model}"):
        network, inputs, written = _network(model, form, origin)
    for path in files:
        fxprune.export(network, path, inputs)
        typer.echo(f"file: {fxprune.latency.size(path.stat().st_size)}, {path} ({written})")


def _network(model: str, form: str | None, origin: dict[str, Any]) -> tuple[nn.Module, Any, str]:
    """Return the network to write, its inputs, and in words which form of it this is."""
    source = Path(model)
    if form is not None and not source.is_dir():
        raise ValueError(f"--form {form}: {model} is no folder that prune wrote; leave it out")
    if source.suffix == ".safetensors":
        network, inputs = read_file(source)
        return network, inputs, _word(_form_of(network))
    if not source.is_dir():
        network, inputs = load_network(model, 0, **origin)
        return network, inputs, _word(_form_of(network))
    networks, inputs, _ = read_folder(source)
    there = [name for name in FORMS if name in networks]
    if form is not None and form not in there:
        raise ValueError(f"--form {form}: in {model} there is {', '.join(there)}")
    form = form or there[0]
    return networks[form], inputs, _word(form)


def _form_of(network: nn.Module) -> str:
    """Return the form of a network that was built from a name or read from a file."""
    if getattr(network, "meta", {}).get("fxprune", {}).get("recipes"):
        return "compact"
    return "masked" if fxprune.masks(network) else "dense"


def _word(form: str) -> str:
    return "masked: dense shapes, with zeros" if form == "masked" else form


def show_flags(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Give ``export`` the flags that say how a network is built."""
    with_flags(export, plain_flags(NETWORK))


show_flags((), {})
