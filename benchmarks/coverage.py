"""Every architecture of timm and torchvision: captured? lowered? anything opaque? seconds, memory.

Each model is built on the meta device (no weights are allocated), captured and lowered in a process of its
own on one core. A line per model goes to a file next to this script as it is done, so that a run goes on
where it was stopped; the table is written to docs/coverage.md:

    python benchmarks/coverage.py               # all (about an hour on one core)
    python benchmarks/coverage.py swin vit      # names that contain one of these, again
    python benchmarks/coverage.py --table       # only write the table from what is there
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import statistics
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from fxprune.capture import capture
from fxprune.lowering import lower

HERE = Path(__file__).parent
RESULTS = HERE / "coverage.jsonl"
TABLE = HERE.parent / "docs" / "coverage.md"
LIMIT_S = 300
VISION = torchvision.__version__.split("+")[0]
ZOO = torchvision.models
SIDES = {"inception_v3": 299, "s3d": 224, "mvit_v1_b": 224, "mvit_v2_s": 224}


def names() -> list[str]:
    vision = [
        name for kind in (ZOO, ZOO.segmentation, ZOO.video, ZOO.detection) for name in ZOO.list_models(kind)
    ]
    return [f"timm:{name}" for name in timm.list_models()] + [f"torchvision:{name}" for name in vision]


def load(name: str) -> tuple[torch.nn.Module, Any]:
    """The model, without weights, and example inputs where it does not know them itself."""
    library, _, own = name.partition(":")
    options: dict[str, Any] = {}
    if own in ZOO.list_models(ZOO.segmentation) + ZOO.list_models(ZOO.detection):
        options["weights_backbone"] = None
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(own).eval(), None
        if "regnet" in own:  # its constructor computes with numbers
            with torch.device("cpu"):
                model = ZOO.get_model(own, weights=None, **options).eval().to("meta")
        else:
            model = ZOO.get_model(own, weights=None, **options).eval()
        side = 224 if own.startswith("swin3d") else SIDES.get(own)
        if own in ZOO.list_models(ZOO.video):
            return model, (torch.zeros(2, 3, 32 if "swin" in own else 16, side or 112, side or 112),)
        if own in ZOO.list_models(ZOO.detection):
            return model, ([torch.zeros(3, 320, 320)],)
        return model, (torch.zeros(2, 3, side or 224, side or 224),)


def measure(name: str) -> dict[str, Any]:
    """Captured and lowered, with the CPU seconds of each."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "captured": False, "lowered": False}
    model, inputs = load(name)
    row["class"] = f"{type(model).__module__}.{type(model).__name__}"
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    start = time.process_time()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        gm = capture(model, inputs)
    middle = time.process_time()
    row |= {"captured": True, "nodes": len(gm.graph.nodes), "capture_s": round(middle - start, 2)}
    row["warnings"] = len(noted)
    graph = lower(gm)
    row |= {"lowered": True, "ops": len(graph.ops), "lower_s": round(time.process_time() - middle, 2)}
    row["kernels"], row["prunable"] = len(graph.kernels), graph.prunable
    row["opaque"] = sorted({op.reason for op in graph.opaque})
    return row


def child(name: str, pipe: Connection) -> None:
    try:
        row = measure(name)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        row = {
            "name": name,
            "captured": False,
            "lowered": False,
            "error": f"{type(error).__name__}: {error}"[:300],
        }
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    pipe.send(row)


def one(name: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(name, theirs))
    process.start()
    row = (
        ours.recv() if ours.poll(LIMIT_S) else {"name": name, "captured": False, "error": f"over {LIMIT_S} s"}
    )
    process.kill()
    process.join()
    return row


def reason(row: dict[str, Any]) -> str:
    text = row.get("error") or "; ".join(row["opaque"])
    return re.sub(r"[^\s(]*/site-packages/", "", text)


def table(rows: list[dict[str, Any]]) -> str:
    """Totals first, failures next, then every model."""
    lines = [
        "# Coverage",
        "",
        "Every architecture of timm and torchvision, built without weights, captured and lowered on one CPU",
        "core. *Opaque* operations are those that no rule knows: every input is taken to reach every output.",
        f"Written by `benchmarks/coverage.py` (timm {timm.__version__}, torchvision {VISION}).",
        "",
        "| library | models | captured | lowered | nothing opaque | median s | slowest s | most memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for library in ("timm", "torchvision"):
        own = [row for row in rows if row["name"].startswith(library + ":")]
        done = [row for row in own if row.get("lowered")]
        if not done:
            continue
        seconds = [row["capture_s"] + row["lower_s"] for row in done]
        captured, plain = sum(row["captured"] for row in own), sum(not row["opaque"] for row in done)
        times = f"{statistics.median(seconds):.2f} | {max(seconds):.1f}"
        memory = max(row["peak_mb"] for row in done)
        lines.append(f"| {library} | {len(own)} | {captured} | {len(done)} | {plain} | {times} | {memory} |")
    failures = [row for row in rows if row.get("error") or row.get("opaque")]
    lines += ["", "## What is left", ""]
    for row in failures:
        lines.append(f"* `{row['name']}`: {reason(row)}")
    lines += [] if failures else ["Nothing."]
    lines += ["", "## All", ""]
    lines += ["| model | weights | nodes | kernel sets | opaque | capture s | lower s | MB |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.get("lowered"):
            sizes = f"{row['prunable']:,} | {row['nodes']} | {row['kernels']} | {len(row['opaque'])}"
            costs = f"{row['capture_s']:.2f} | {row['lower_s']:.2f} | {row['peak_mb']}"
            lines.append(f"| {row['name']} | {sizes} | {costs} |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> None:
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {row["name"]: row for row in known}
    every = names()
    if words != ["--table"]:
        for name in every:
            if not (any(word in name for word in words) if words else name not in done):
                continue
            done[name] = one(name)
            print(json.dumps(done[name])[:200], flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table([done[name] for name in every if name in done]))


if __name__ == "__main__":
    main(sys.argv[1:])
