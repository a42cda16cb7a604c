"""Measure compaction of pruned networks: parameters, MACs, what is given back, the largest difference.

The smallest model of every family of timm, with weights and biases drawn anew, is pruned in several ways and
compacted; outputs are compared in the same run. A line per model and way goes to a file next to this script
as it is done, so that a run goes on where it was stopped; the table is written to docs/compaction_table.md:

    python benchmarks/compaction.py              # all (about an hour on one core)
    python benchmarks/compaction.py resnet vit   # names that contain one of these, again
    python benchmarks/compaction.py --table      # only write the table from what is there
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
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
    reasons = [layer.reason for layer in table.layers if layer.given_back]
    return {
        **row,
        "parameters": table.parameters,
        "macs": table.macs,
        "dead": dead,
        "given_back": table.given_back,
        "difference": table.difference,
        "reason": max(set(reasons), key=reasons.count) if reasons else "",
    }


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write docs/compaction_table.md."""
    done = [row for row in rows if "error" not in row]
    lines = [
        "# Compaction, model by model",
        "",
        f"`python benchmarks/compaction.py`: {len(done)} of {len(rows)} runs compact with equal outputs.",
        "",
        "| model | masks | parameters left | MACs left | dead channels | given back | difference | why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["way"])):
        if "error" in row:
            lines.append(f"| {row['model']} | {row['way']} | | | | | | {row['error']} |")
            continue
        before, after = row["parameters"]
        macs = row["macs"][1] / max(1, row["macs"][0])
        lines.append(
            f"| {row['model']} | {row['way']} | {after / before:.1%} | {macs:.1%} | {row['dead']} | "
            f"{row['given_back']} | {row['difference']:.0e} | {row['reason'].replace('|', '/')[:80]} |"
        )
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    rows = {(row["model"], row["way"]): row for row in old}
    if "--table" not in sys.argv:
        for name in SIZES:
            for way in WAYS:
                wanted = any(word in name for word in words) if words else (name, way) not in rows
                if wanted:
                    rows[name, way] = row = measure(name, way)
                    print(json.dumps(row), flush=True)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    write_table(list(rows.values()))


if __name__ == "__main__":
    main()
