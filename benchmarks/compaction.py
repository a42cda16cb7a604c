"""Measure compaction of pruned networks: parameters, MACs, what is given back, the largest difference.

The smallest model of every family of timm, with weights and biases drawn anew, is pruned in several ways and
compacted; outputs are compared in the same run. A line per model and way goes to a file next to this script
as it is done, so that a run goes on where it was stopped; the table is written to docs/compaction_table.md:

    python benchmarks/compaction.py               # all, the smallest first (many hours on one core)
    python benchmarks/compaction.py --limit 420   # give a run up after that many seconds of CPU
    python benchmarks/compaction.py resnet vit    # names that contain one of these, again
    python benchmarks/compaction.py --table       # only write the table from what is there
"""

from __future__ import annotations

import argparse
import json
import signal
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from torch import nn

import fxprune

HERE = Path(__file__).parent
RESULTS = HERE / "compaction.jsonl"
TABLE = HERE.parent / "docs" / "compaction_table.md"
SIZES: dict[str, int] = json.loads((HERE.parent / "tests" / "representatives.json").read_text())
WAYS: dict[str, dict[str, Any]] = {
    "channel 30 %": {"method": "magnitude", "sparsity": 0.3, "granularity": "channel"},
    "channel 60 %": {"method": "magnitude", "sparsity": 0.6, "granularity": "channel"},
    "synflow 90 %": {"method": "synflow", "sparsity": 0.9, "rounds": 10},
    "magnitude 98 %": {"method": "magnitude", "sparsity": 0.98, "on_collapse": "repair"},
}


def load(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model with random weights and biases, none of them zero, and an input."""
    torch.manual_seed(0)
    size = SIZES[name]
    try:
        model = timm.create_model(name, img_size=size)
    except TypeError:
        model = timm.create_model(name)
    channels = model.pretrained_cfg["input_size"][0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(0.01, 0.1))
            elif not bool(parameter.any()):
                nn.init.trunc_normal_(parameter, std=0.02)
    return model.eval(), torch.randn(2, channels, size, size)


def measure(name: str, way: str) -> dict[str, Any]:
    """Prune and compact one model; say what is left, or what went wrong."""
    row: dict[str, Any] = {"model": name, "way": way}
    try:
        model, x = load(name)
        start = time.process_time()
        pruned = fxprune.apply(model, example_inputs=x, progress=False, **WAYS[way])
        row["apply_s"] = round(time.process_time() - start, 2)
        start = time.process_time()
        small = fxprune.compact(pruned, x)
        row["compact_s"] = round(time.process_time() - start, 2)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
        return {**row, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    table = small.meta["fxprune"]["compaction"]
    dead = sum(layer.outputs[0] - layer.outputs[1] + layer.given_back for layer in table.layers)
    reasons: dict[str, int] = {}  # channels by reason, with the places that give it
    for layer in table.layers:
        if layer.given_back:
            reasons[layer.reason] = reasons.get(layer.reason, 0) + layer.given_back
    return {
        **row,
        "parameters": table.parameters,
        "macs": table.macs,
        "dead": dead,
        "given_back": table.given_back,
        "difference": table.difference,
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
    }


def _why(reasons: dict[str, int]) -> str:
    """The reason that holds the most channels, whatever the place, and how many."""
    kinds: dict[str, int] = {}
    for reason, count in reasons.items():
        kind = reason.partition(": ")[2] or reason
        kinds[kind] = kinds.get(kind, 0) + count
    most = max(kinds, key=kinds.__getitem__, default="")
    return f"{most.replace('|', '/')[:80]} ({kinds[most]})" if most else ""


OUTPUT = "output: an output of the network"
"""The reason of outputs that no path reaches: they keep their shape, and are no channels that could go."""


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write docs/compaction_table.md."""
    done = [row for row in rows if "error" not in row]
    for row in done:
        held = row["reasons"].pop(OUTPUT, 0)
        row["dead"], row["given_back"] = row["dead"] - held, row["given_back"] - held
    most = [row for row in done if row["given_back"] > 0.05 * row["dead"]]
    lines = [
        "# Compaction, model by model",
        "",
        f"`python benchmarks/compaction.py --limit 420`: {len(done)} of {len(rows)} runs compact with equal "
        f"outputs, of {len({row['model'] for row in rows})} models; all {len(SIZES)} models under "
        f"{len(WAYS)} kinds of masks are {len(SIZES) * len(WAYS)} runs. Dead channels are output channels "
        "without a weight on a path, those of the network's outputs left out. "
        f"{sum(not row['given_back'] for row in done)} runs give nothing back, "
        f"{len(most)} more than 5 % of the dead channels; *why* names the reason that "
        "holds most of them, and how many "
        "([what they mean](compaction.md#what-stays-and-is-named-in-the-table)). "
        "All biases are drawn, none is zero, so that a pruned channel is a constant: the worst case.",
        "",
        *([*HEAD, *map(_line, sorted(most, key=_place)), "", "All of them:", ""] if most else []),
        *HEAD,
    ]
    for row in sorted(rows, key=_place):
        lines.append(_line(row))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


HEAD = (
    "| model | masks | parameters left | MACs left | dead channels | given back | difference | why |",
    "|---|---|---|---|---|---|---|---|",
)


def _place(row: dict[str, Any]) -> tuple[str, str]:
    return row["model"], row["way"]


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['model']} | {row['way']} | | | | | | {row['error']} |"
    before, after = row["parameters"]
    macs = row["macs"][1] / max(1, row["macs"][0])
    return (
        f"| {row['model']} | {row['way']} | {after / before:.1%} | {macs:.1%} | {row['dead']} | "
        f"{row['given_back']} | {row['difference']:.0e} | {_why(row['reasons'])} |"
    )


class Late(BaseException):
    """Says that a run took all the seconds that it was given: nothing in it may catch this."""


def within(seconds: float, name: str, way: str) -> dict[str, Any] | None:
    """Measure a run, or give it up after ``seconds`` of CPU (0: never)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Late

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return measure(name, way)
    except Late:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def weights_of(name: str) -> int:
    """Count the parameters of a model without making them."""
    with torch.device("meta"):
        try:
            model = timm.create_model(name, img_size=SIZES[name])
        except TypeError:
            model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def run(names: list[str], limit: float, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Measure the runs of models whose name contains one of ``names``, or all that have no row yet."""
    todo = [name for name in SIZES if not names or any(word in name for word in names)]
    for name in sorted(todo, key=weights_of):
        for way in WAYS:
            if not names and (name, way) in rows:
                continue
            row = within(limit, name, way)
            if row is None:
                print(f"{name}, {way}: given up after {limit:g} s", flush=True)
                continue
            rows[name, way] = row
            print(json.dumps(row), flush=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="measure these again; without any, all that have no row yet")
    parser.add_argument(
        "--limit", type=float, default=0, help="seconds of CPU for a run (0: as many as it takes)"
    )
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    rows = {(row["model"], row["way"]): row for row in old}
    if not options.table:
        run(options.names, options.limit, rows)
    write_table(list(rows.values()))


if __name__ == "__main__":
    main()
