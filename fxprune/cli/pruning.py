"""The commands ``prune``, ``analyze`` and ``graph``: parse their words, call the library, print and write.

The flags of ``prune`` are its own and the options of every method, read off their source. The library is used
by its public names, which are imported when they are first asked for: help needs no PyTorch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

import fxprune
from fxprune.cli.channel_flags import channel_flags, split
from fxprune.cli.folder import (
    COMPACT,
    MASKED,
    REPORT,
    check_export,
    dense_bytes,
    read_folder,
    write_networks,
)
from fxprune.cli.hugging_face import folder_of, write_folder
from fxprune.cli.methods import FOLDER, read_entries
from fxprune.cli.sources import load_data, load_network
from fxprune.progress import Display

if TYPE_CHECKING:
    from torch import fx, nn

    from fxprune.methods import Option
    from fxprune.metrics import Report

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="timm:NAME, torchvision:NAME, hf:FOLDER, or path/to/file.py:factory."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Budget = Annotated[
    str, typer.Option(help="global, uniform, erk, or sparsities by layer: 'fc=0.5,layer1.*=0.8'.")
]
Granularity = Annotated[str, typer.Option(help="weight, kernel, channel, head, nm(2,4) or block(16,16).")]
Data = Annotated[
    str | None,
    typer.Option(
        help="path/to/file.py:factory of (x, y) or of batches; for hf:FOLDER also .txt (text), .npy or .npz."
    ),
]
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
    float, typer.Option("--sparsity", "-s", help="Fraction of the prunable weights to remove, in [0, 1).")
]
Rounds = Annotated[str | None, typer.Option(help="oneshot, linear, exponential, cubic, sigmoid.")]
Resolution = Annotated[str, typer.Option(help="spatial (exact) or channel (faster, an upper bound).")]


def prune(
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help="See `fxprune methods`.")] = "synflow",
    sparsity: Sparsity = 0.9,
    budget: Budget = "global",
    granularity: Granularity = "weight",
    schedule: Rounds = None,
    exclude: Excluded = None,
    seed: Annotated[int, typer.Option(help="Decides the model's initial weights and the masks.")] = 0,
    data: Data = None,
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
    channel = split(options)
    given = {name: value for name, value in options.items() if value is not None}
    chosen: Any = fxprune.methods.resolve(method, **read_values(method, given))
    asked = {
        "budget": read_budget(budget),
        "granularity": granularity,
        **channel,
        "schedule": schedule,
        "exclude": tuple(exclude or ()),
    }
    if plan is not None:
        chosen, asked = _by_plan(plan, {**asked, **given}), {}
        method, sparsity, seed = chosen.method, chosen.sparsity, chosen.seed
    _check_files(out, export or ())
    own = folder_of(model) is not None  # a model of transformers stays of its own class
    if own and compact:
        raise ValueError("--compact: a folder of transformers is written in its dense shapes; leave it out")
    display = Display()
    with display.step(f"load {model}"):
        network, inputs = load_network(model, seed)
    pruned = fxprune.apply(
        network,
        chosen,
        sparsity,
        example_inputs=inputs,
        data=None if data is None else load_data(data, model, network),
        returns="module" if own else "graph",
        **asked,
        seed=seed, device=device, on_collapse=on_collapse,  # type: ignore[arg-type]  # apply says which words
    )  # fmt: skip
    with display.step("analyze"):
        report = fxprune.analyze(pruned, example_inputs=inputs if own else None)
    facts = {"model": model, "method": method, "options": given, "seed": seed}
    measured, lines = _results(
        network, pruned, inputs, out=out, compact=compact, export=export or [], display=display,
        facts={**facts, "sparsity": sparsity},
    )  # fmt: skip
    text = _json(report, {**facts, **measured})
    if out is not None:
        (out / REPORT).write_text(text + "\n", encoding="utf-8")
    typer.echo(text if json_ else "\n".join([str(report), *lines]))


def _check_files(out: Path | None, export: Sequence[Path]) -> None:
    """``ValueError`` for files that cannot be written."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: there is a file of that name; expected a folder, or a new name")
    for path in export:
        check_export(path)


def _by_plan(path: Path, asked: dict[str, Any]) -> fxprune.Plan:
    """Read a plan; ``ValueError`` where other flags say what the plan says."""
    usual = {"budget": "global", "granularity": "weight", "schedule": None, "exclude": ()}
    odd = next((name for name, value in asked.items() if value != usual.get(name)), None)
    if odd is not None:
        raise ValueError(f"--plan {path}: the plan says what {_flag(odd)} would; leave one of them out")
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
    small = None
    time = pruned.meta.get("fxprune", {}).get("latency")
    if time is not None:
        found["latency"] = asdict(time)
        lines.append(str(time))
    if compact:
        with display.step("compact"):
            small = fxprune.compact(pruned)
        with display.step("measure"):
            timings = fxprune.latency.measure({"dense": network, "compact": small}, inputs)
        found["milliseconds"] = {one.network: one.median for one in timings}
        table = small.meta["fxprune"]["compaction"]
        lines.append(f"compact: {table.parameters[1]:,} of {table.parameters[0]:,} parameters")
        lines.append(fxprune.latency.sentence(timings))
    if out is not None:
        with display.step(f"write {out}"):
            own = folder_of(facts["model"]) is not None
            files = (
                write_folder(out, pruned, facts["model"])
                if own
                else write_networks(out, pruned, small, facts)
            )
        whole = dense_bytes(network)
        found["bytes"] = {"dense": whole, **files}
        size = fxprune.latency.size
        lines += [f"file: {size(whole)} dense -> {size(n)}, {out / name}" for name, n in files.items()]
    for path in export:
        with display.step(f"export {path}"):
            fxprune.export(pruned if small is None else small, path)
        lines.append(f"file: {fxprune.latency.size(path.stat().st_size)}, {path}")
    return found, lines


def analyze(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|DIR", help="A model as for prune, or a folder that prune wrote."),
    ],
    resolution: Resolution = "spatial",
    json_: AsJson = False,
) -> None:
    """Report on a network, dense or pruned: density, effective paths, nodes, kernels, multiply-adds."""
    if resolution not in ("spatial", "channel"):
        raise ValueError(f"--resolution {resolution}: expected spatial or channel")
    display = Display()
    with display.step(f"load {model}"):
        if Path(model).is_dir():
            networks, _, facts = read_folder(Path(model))
            network = networks["masked"]
        else:
            network, facts = _captured(model)
    with display.step("analyze"):
        report = fxprune.analyze(network, resolution)  # type: ignore[arg-type]  # checked above
    typer.echo(_json(report, facts) if json_ else report)


def graph(model: Model) -> None:
    """Show the channel and kernel graph that a network is lowered to."""
    display = Display()
    with display.step(f"capture {model}"):
        network, _ = _captured(model)
    with display.step("lower"):
        lowered = fxprune.lower(network)
    typer.echo(lowered.summary())


def _captured(source: str) -> tuple[Any, dict[str, Any]]:
    network, inputs = load_network(source, 0)
    return fxprune.capture(network, inputs), {"model": source}


def _json(report: Report, facts: dict[str, Any]) -> str:
    return json.dumps({**facts, **json.loads(report.to_json())}, indent=2)


def read_budget(text: str) -> str | dict[str, float]:
    if "=" not in text:
        return text
    entries = {}
    for entry in text.split(","):
        pattern, _, value = entry.rpartition("=")
        try:
            entries[pattern.strip()] = float(value)
        except ValueError as error:
            raise ValueError(f"--budget {text}: expected layer=sparsity, not {entry!r}") from error
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


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _method_flags() -> list[inspect.Parameter]:
    """Make one flag for every option of every method; methods that share an option share the flag."""
    owners: dict[str, dict[str, list[str]]] = {}
    switches: dict[str, bool] = {}
    for entry in sorted(read_entries(FOLDER), key=lambda entry: entry.name):
        for name, default in entry.options.items():
            note = f"{entry.notes.get(name, name)} (default {default})"
            owners.setdefault(name, {}).setdefault(note, []).append(entry.name)
            switches[name] = switches.get(name, True) and name in entry.switches
    flags = []
    for name, notes in sorted(owners.items()):
        text = "; ".join(f"{', '.join(users)}: {note}" for note, users in notes.items())
        spelled = f"{_flag(name)}/--no-{_flag(name)[2:]}" if switches[name] else _flag(name)
        word = typer.Option(spelled, help=escape(text), rich_help_panel="Options of methods")
        kind = Annotated[bool | None, word] if switches[name] else Annotated[str | None, word]
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    return flags


def register(command: Any) -> None:
    """Give a command a flag for every option of channels, and of every method."""
    signature = inspect.signature(command, eval_str=True)
    own = [
        parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD
    ]
    command.__signature__ = signature.replace(parameters=own + channel_flags() + _method_flags())


register(prune)
