"""The command ``prune``: parse its words, call the library, print and write.

Its flags are its own, and the options of every method, read off their source. The library is used by its
public names, which are imported when they are first asked for: help needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxprune
from fxprune.cli.channel_flags import channel_flags, read_by_layer, split, take_threads
from fxprune.cli.data_sources import load_batches
from fxprune.cli.flags import (
    DATA,
    NETWORK,
    complete_method,
    method_flags,
    named_method,
    plain_flags,
    take,
    with_flags,
)
from fxprune.cli.folder import (
    COMPACT,
    MASKED,
    REPORT,
    check_can_be_made,
    check_export,
    dense_bytes,
    write_networks,
)
from fxprune.cli.hugging_face import check_compact, folder_of, token_loss, write_folder
from fxprune.cli.methods import FOLDER, read_entries
from fxprune.cli.reports import AsJson, Model, as_json, set_threads
from fxprune.cli.sources import load_network
from fxprune.keywords import TRAINING_METHODS
from fxprune.progress import Display
from fxprune.whole_files import write_text

if TYPE_CHECKING:
    from torch import fx, nn

    from fxprune.methods import Option

METHOD = "synflow"
Method = Annotated[
    str,
    typer.Option(
        "--method", "-m", help="See `fxprune methods`; --method NAME --help lists its options.",
        autocompletion=complete_method,
    ),
]  # fmt: skip
Budget = Annotated[
    str, typer.Option(help="global, uniform, erk, owl, or sparsities by layer: 'fc=0.5,layer1.*=0.8'.")
]
Granularity = Annotated[str, typer.Option(help="weight, kernel, channel, head, 2:4 or block(16,16).")]
Out = Annotated[
    Path | None, typer.Option(help=f"Folder for {REPORT}, {MASKED} and, with --compact, {COMPACT}.")
]
Compact = Annotated[
    bool, typer.Option("--compact", help="Remove channels on no path, and measure what that brings.")
]
Exports = Annotated[
    list[Path] | None, typer.Option(help="File to export to, .onnx or .pt2; may be repeated.")
]
Excluded = Annotated[
    list[str] | None, typer.Option(help="Module or pattern that is not pruned; may be repeated.")
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity", "-s", help="Fraction of the prunable weights to remove, in [0, 1); 0.9, or that of 2:4."
    ),
]
Rounds = Annotated[str | None, typer.Option(help="oneshot, linear, exponential, cubic, sigmoid.")]


def prune(
    model: Model,
    method: Method = METHOD,
    sparsity: Sparsity = None,
    budget: Budget = "global",
    granularity: Granularity = "weight",
    schedule: Rounds = None,
    exclude: Excluded = None,
    seed: Annotated[int, typer.Option(help="Decides the model's initial weights and the masks.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to score: cpu, cuda, cuda:1.")] = None,
    on_collapse: Annotated[str, typer.Option(help="warn, raise or repair.")] = "warn",
    plan: Annotated[
        Path | None, typer.Option(help="File of `fxprune plan --out`: prune by it, whatever the method.")
    ] = None,
    out: Out = None,
    compact: Compact = False,
    export: Exports = None,
    json_: AsJson = False,
    **options: Any,
) -> None:
    """Prune a network and report what is left of it."""
    origin, source, channel = take(options, NETWORK), take(options, DATA), split(options)
    given = {name: value for name, value in options.items() if value is not None}
    chosen = choose_method(method, given)
    set_threads(take_threads(channel))
    asked = {"budget": read_budget(budget), "granularity": granularity, **channel, "schedule": schedule,
             "exclude": tuple(exclude or ())}  # fmt: skip
    if plan is not None:
        chosen = _by_plan(plan, {**asked, **given, "sparsity": sparsity, "data": source.get("data")})
        method, sparsity, seed = chosen.method, chosen.sparsity, chosen.seed
    _check_files(model, out, export or (), compact and plan is None, granularity)
    display = Display()
    with display.step(f"load {model}"):
        network, inputs = load_network(model, seed, **origin)
        batches = load_batches(model, network, inputs, seed, **source)
    own = folder_of(model) is not None  # a model of transformers stays of its own class
    loss = token_loss(network) if own else None
    asked = {} if plan is not None else {"data": batches, "loss_fn": loss, "seed": seed, **asked}
    pruned = fxprune.apply(
        network,
        chosen,
        None if plan is not None else sparsity,
        example_inputs=inputs,
        returns="module" if own else "graph",
        **asked,
        device=device, on_collapse=on_collapse,  # type: ignore[arg-type]  # apply says which words
    )  # fmt: skip
    with display.step("analyze"):
        report = fxprune.analyze(pruned, example_inputs=inputs if own else None)
    facts = {"model": model, "method": method, "options": given, "seed": seed}
    facts |= {name: str(value) for name, value in origin.items() if value}
    measured, lines = _results(
        network, pruned, inputs, out=out, compact=compact, export=export or [], display=display,
        facts={**facts, "sparsity": report.sparsity if sparsity is None else sparsity},
    )  # fmt: skip
    text = as_json(report, {**facts, **measured})
    if out is not None:
        write_text(out / REPORT, text + "\n")
    typer.echo(text if json_ else "\n".join([str(report), *lines]))


def choose_method(method: str, given: dict[str, Any]) -> Any:
    """Return the method with its options; the refusal of one that prunes in training names its command."""
    if method in TRAINING_METHODS:
        raise ValueError(f"--method {method}: prunes while a network trains: fxprune train --method {method}")
    return fxprune.methods.resolve(method, **read_values(method, given))


def _check_files(
    model: str, out: Path | None, export: Sequence[Path], compact: bool, granularity: str
) -> None:
    """``ValueError`` for files that cannot be written."""
    if compact and folder_of(model) is not None:
        check_compact(granularity)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: there is a file of that name; expected a folder, or a new name")
    if out is not None:
        check_can_be_made(out)
    for path in export:
        check_export(path)


def _by_plan(path: Path, asked: dict[str, Any]) -> fxprune.Plan:
    """Read a plan; ``ValueError`` where other flags say what the plan says."""
    usual = {"budget": "global", "granularity": "weight", "schedule": None, "exclude": ()}
    odd = next((name for name, value in asked.items() if value != usual.get(name)), None)
    if odd is not None:
        raise ValueError(
            f"--plan {path}: the plan says what --{odd.replace('_', '-')} would; leave one of them out"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"--plan {path}: there is no such file; `fxprune plan MODEL --out` writes one"
        )
    return fxprune.Plan.load(path)


def _results(
    network: nn.Module,
    pruned: fx.GraphModule,
    inputs: Any,
    *,
    out: Path | None,
    compact: bool,
    export: list[Path],
    display: Display,
    facts: dict[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Write and measure what was asked for; return it by name, and as lines to print."""
    found: dict[str, Any] = {}
    lines: list[str] = []
    notes: list[str] = []
    small, own = None, folder_of(facts["model"])
    time = getattr(pruned, "meta", {}).get("fxprune", {}).get("latency")
    if time is not None:
        found["latency"] = asdict(time)
        lines.append(str(time))
    if compact:
        small = fxprune.compact(pruned, example_inputs=None if own is None else inputs)
        with display.step("measure"):
            timings = fxprune.latency.measure({"dense": network, "compact": small}, inputs)
        found["milliseconds"] = {one.network: one.median for one in timings}
        table = small.meta["fxprune"]["compaction"]
        lines.append(f"compact: {table.parameters[1]:,} of {table.parameters[0]:,} parameters")
        lines.append(fxprune.latency.sentence(timings))
    if out is not None:
        with display.step(f"write {out}"):
            if own is None:
                files = write_networks(out, pruned, small, facts)
            else:
                files, notes = write_folder(out, pruned, facts["model"], network, small, inputs)
        whole = dense_bytes(network)
        found["bytes"] = {"dense": whole, **files}
        size = fxprune.latency.size
        lines += notes
        lines += [f"file: {size(whole)} dense -> {size(n)}, {out / name}" for name, n in files.items()]
    for path in export:
        fxprune.export(pruned if small is None else small, path)
        lines.append(f"file: {fxprune.latency.size(path.stat().st_size)}, {path}")
    return found, lines


def read_budget(text: str) -> str | dict[str, float]:
    if "=" not in text:
        return text
    entries = read_by_layer("--budget", text, float, "expected layer=sparsity")
    assert isinstance(entries, dict)
    return entries


def read_values(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The words after a method's flags as values of its options' types."""
    known = fxprune.methods.options(method)
    return {name: _value(known[name], text) if name in known else text for name, text in given.items()}


def _value(option: Option, text: Any) -> Any:
    """Read a value from ``text``; return the text itself where it means nothing, for the method to refuse."""
    if option.choices:
        return next((choice for choice in option.choices if str(choice) == text), text)
    if NoneType in option.types and text == "none":
        return None
    for kind in (int, float):
        if kind in option.types:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def show_flags(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Give ``prune`` its flags; its help shows the options of the method that is named."""
    chosen = named_method(words, settings, METHOD)
    shared = plain_flags({**NETWORK, **DATA})
    with_flags(prune, shared + channel_flags() + method_flags(read_entries(FOLDER), chosen))


show_flags((), {})
