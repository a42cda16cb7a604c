"""Models of other libraries and nets of single operations: captured, exact, prunable, smaller?

Each model is built small, from a configuration, with random weights (`more_models.py`, `more_libraries.py`,
`more_nets.py`), and is run in a process of its own. It runs once in eager mode before it is captured; what it
gave is compared. A line per model goes to a file next to this script as it is done, so that a run goes on
where it was stopped:

    python benchmarks/coverage_more.py              # all
    python benchmarks/coverage_more.py bert nets    # names that contain one of these, again
    python benchmarks/coverage_more.py --table      # only write the table from what is there
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import more_libraries
import more_models
import more_nets
import torch
from torch import Tensor, nn

import fxprune
from fxprune.lowering import hidden_layers, matrices_outside
from fxprune.rewrite.masking.computed import settled

HERE = Path(__file__).parent
RESULTS = HERE / "coverage_more.jsonl"
TABLE = HERE.parent / "docs" / "coverage_more.md"
FOLDERS = re.compile(r"/[\w./-]*/(?=[\w.-]+\.py)")


def without_folders(text: str) -> str:
    """Leave the names of files, and drop where they are on this machine."""
    return FOLDERS.sub("", text)


LIMIT_S = 240
QUICK = False
"""Capture and lower only, for a first look."""
MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **more_models.MODELS,
    **more_libraries.LIBRARIES,
    **more_nets.MODELS,
}
CHECKS = ("captured", "eval", "train", "lowered", "magnitude", "step", "synflow", "channel")
PACKAGES = {"torch_geometric": "torch-geometric"}
SHARED = (
    "torch._dynamo", "transformers.modeling_utils", "transformers.loss.loss_utils", "transformers.generation",
    "diffusers.models.unets", "segmentation_models_pytorch", "monai.networks.nets", "torch_geometric.nn",
    "ultralytics.nn.tasks", "kornia.feature", "open_clip", "x_transformers", "torchaudio.models",
    "fxprune.api", "fxprune.rewrite.compact.compaction",
)  # fmt: skip
"""Imported once, before the processes part: each would need seconds for them."""
PRUNABLE = 0.97
UNKNOWN = ("cannot be removed", "inside of", "no rule", "no layer")
"""Words of reasons that say more of fxprune than of the net: these are counted as faults."""
NO_PATH = "no path leads from its inputs to its outputs"
REFUSAL = "this graph is for evaluation"


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif not isinstance(value, list | tuple):
        value = (
            [v for v in vars(value).values() if isinstance(v, Tensor)] if hasattr(value, "__dict__") else []
        )
    return [tensor for item in value for tensor in tensors(item)]


def run(model: nn.Module, inputs: Any) -> Any:
    """Run a model from the same random numbers each time."""
    inputs = copy.deepcopy(inputs)
    torch.manual_seed(0), random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def difference(got: Any, wanted: Any, accuracy: float = 1e-5) -> str:
    """Say how two results differ; "" if they do not."""
    if type(got) is not type(wanted):
        return f"{type(got).__name__} for {type(wanted).__name__}"
    mine, other = tensors(got), tensors(wanted)
    if len(mine) != len(other):
        return f"{len(mine)} tensors for {len(other)}"
    for a, b in zip(mine, other, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {list(a.shape)} for {b.dtype} {list(b.shape)}"
        if a.numel() and not torch.equal(a, b):
            a, b = a.detach().to(torch.complex128), b.detach().to(torch.complex128)
            if not torch.allclose(a, b, rtol=accuracy, atol=accuracy * float(b.abs().max()), equal_nan=True):
                return f"off by {float((a - b).abs().max()):.1e}"
    return ""


def tried(row: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Do a piece of work; what goes wrong is noted under its name."""
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            result = work()
    except Exception as error:  # anything at all is what is looked for here
        row[name] = without_folders(f"{type(error).__name__}: {error}")[:400]
        return None
    row[name] = result if isinstance(result, str) else ""
    notes = [
        without_folders(str(w.message)) for w in noted if str(w.message).startswith(("capture:", "apply:"))
    ]
    if notes:
        row.setdefault("notes", {})[name] = [note[:300] for note in notes[:6]]
    return result


def step(pruned: nn.Module, inputs: Any) -> str:
    """Train for one step; the masks must hold."""
    pruned.train()
    optimizer = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=1e-3)
    found = [t for t in tensors(run(pruned, inputs)) if t.requires_grad and t.numel()]
    if found:  # what is counted (a histogram) has no gradient
        torch.stack([t.abs().double().mean() for t in found]).sum().backward()
    optimizer.step()
    fxprune.verify(pruned)
    return ""


def smaller(model: nn.Module, inputs: Any) -> str:
    pruned = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=inputs, progress=False
    ).eval()
    small = fxprune.compact(pruned, example_inputs=inputs).eval()
    count = [sum(p.numel() for p in net.parameters()) for net in (model, small)]
    with torch.no_grad():
        found = difference(run(small, inputs), run(pruned, inputs), 1e-4)
    return found or ("" if count[1] < count[0] else "nothing went")


def held(gm: nn.Module) -> str:
    """Say why no channel of a network may go; "" if one may."""
    groups = fxprune.channel_groups(gm)
    reasons = Counter(group.reason for group in groups if group.size)
    if "" in reasons:
        return ""
    return "no channel may go: " + ("; ".join(reason for reason, _ in reasons.most_common(3)) or "no layer")


def measure(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {"name": name}
    model, inputs = MODELS[name]()
    inputs = inputs if isinstance(inputs, tuple | dict) else (inputs,)
    row["class"] = f"{type(model).__module__}.{type(model).__name__}"
    row["parameters"] = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        wanted = run(copy.deepcopy(model).eval(), inputs)
    eager = copy.deepcopy(model).train()
    trains = tried(row, "trains", lambda: run(eager, inputs))
    start = time.process_time()
    gm = tried(row, "captured", lambda: fxprune.capture(model, inputs))
    row["capture_s"] = round(time.process_time() - start, 2)
    if gm is not None:
        own = copy.deepcopy(gm)
        with torch.no_grad():
            tried(row, "eval", lambda: difference(run(own.eval(), inputs), wanted))
        if trains is not None:
            tried(row, "train", lambda: difference(run(own.train(), inputs), trains))
        graph = tried(row, "lowered", lambda: fxprune.lower(gm))
        if graph is not None:
            row["opaque"] = sorted({op.reason for op in graph.opaque})
            plain = settled(model)  # weights that it computes (weight_norm) are pruned as such
            seen = gm if plain is model else fxprune.capture(plain, inputs)
            graph = graph if plain is model else fxprune.lower(seen)
            outside = matrices_outside(seen, graph)
            total = graph.prunable + sum(outside.values())
            for name in hidden_layers(seen, graph):  # pruned by what needs no paths
                outside.pop(name, None)
            row["outside"] = dict(list(outside.items())[:8])
            row["share"] = round(1 - sum(outside.values()) / max(total, 1), 3)
    if QUICK:
        return row
    row["lower_s"] = round(time.process_time() - start - row["capture_s"], 2)
    refuses = REFUSAL in row.get("train", "")
    if refuses:  # as it says itself; its own class is pruned and trained
        row["train"], row["refused"] = "", row["train"]
    returns = "graph" if gm is not None and not refuses else "module"
    options: Any = {"example_inputs": inputs, "progress": False, "returns": returns}
    pruned = tried(row, "magnitude", lambda: fxprune.apply(model, "magnitude", 0.5, **options))
    if pruned is not None and trains is not None:
        tried(row, "step", lambda: step(pruned, inputs))
    tried(row, "synflow", lambda: fxprune.apply(model, "synflow", 0.5, rounds=2, **options))
    none = tried(row, "held", lambda: held(gm)) if gm is not None else None
    if none:
        row["channel"], row["held"] = None, none
    else:
        row.pop("held", None)
        tried(row, "channel", lambda: smaller(model, inputs))
        if NO_PATH in row["channel"]:
            row["channel"], row["held"] = None, f"no channel may go: {NO_PATH}"
    row["seconds"] = round(time.process_time() - start, 1)
    return row


def child(name: str, pipe: Connection) -> None:
    try:
        row = measure(name)
    except Exception as error:
        row = {"name": name, "broken": without_folders(f"{type(error).__name__}: {error}")[:300]}
    pipe.send(row)


def one(name: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        row: dict[str, Any] = (
            ours.recv() if ours.poll(LIMIT_S) else {"name": name, "captured": f"over {LIMIT_S} s"}
        )
    except EOFError:
        row = {"name": name, "captured": "the process died"}
    process.kill()
    process.join()
    return row


def rightly_held(row: dict[str, Any]) -> bool:
    """Whether no channel of a net may go, for reasons of the net's own."""
    return bool(row.get("held")) and not any(word in row["held"] for word in UNKNOWN)


def faults(row: dict[str, Any]) -> list[str]:
    """Say everything that is not clean about a model, in one line each."""
    lines = [f"{check}: {row[check]}" for check in CHECKS if row.get(check)]
    if row.get("held") and not rightly_held(row):
        lines.append(f"channel: {row['held']}")
    lines += [f"opaque: {reason}" for reason in row.get("opaque", ())]
    if row.get("share", 1) < PRUNABLE:
        lines.append(
            f"{row['share']:.0%} of the matrix weights prunable, without {', '.join(row['outside'])[:150]}"
        )
    return [_short(line) for line in lines]


def calls(row: dict[str, Any]) -> list[str]:
    """Say which parts of a model stay one call of their module, in one line each."""
    notes = row.get("notes", {}).get("captured", ())
    return [_short(note.removeprefix("capture: ")) for note in notes if "kept whole" in note]


def _short(line: str) -> str:
    return re.sub(r"[^\s(]*/site-packages/", "", line.replace("\n", " "))[:240]


def table(rows: list[dict[str, Any]]) -> str:
    """Totals first, failures next, then every model."""
    libraries = sorted({row["name"].partition(":")[0] for row in rows})
    lines = [
        "# Coverage beyond timm and torchvision",
        "",
        "Small models with random weights, each in a process of its own; outputs are compared with those of",
        "the eager model, run before. *Prunable* is the share of matrix weights; *channel* means 30 % of the",
        "channels removed, compacted, equal outputs; *none may go*: nets of which no channel can go (all are",
        "inputs or outputs, say), which is no fault. *Refuses to train*: the graph of a model that decides",
        "by random numbers is that of evaluation and says so; its own class was pruned and trained.",
        "*One call*: a part of the model stays a call of its module; what is inside is lowered as all else",
        "is, and counts in the other columns. *Clean*: nothing is missing in any other column.",
        "Written by `benchmarks/coverage_more.py`.",
        "",
        "| library | models | captured | exact eval | exact train | nothing opaque | prunable >= 97 % "
        "| refuses to train | magnitude | training step | SynFlow | channel | none may go | one call "
        "| clean |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for library in [*libraries, "all"]:
        own = [row for row in rows if library in ("all", row["name"].partition(":")[0])]
        good = {check: sum(row.get(check) == "" for row in own) for check in CHECKS}
        plain = sum(row.get("opaque") == [] for row in own)
        most = sum(row.get("share", 0) >= PRUNABLE for row in own)
        clean = sum(not faults(row) for row in own)
        refused = sum("refused" in row for row in own)
        numbers = [len(own), *(good[check] for check in CHECKS[:2]), good["train"] - refused, plain, most]
        numbers += [refused, *(good[check] for check in ("magnitude", "step", "synflow", "channel"))]
        numbers += [sum(rightly_held(row) for row in own), sum(bool(calls(row)) for row in own)]
        lines.append(f"| {library} {version(library)} | {' | '.join(map(str, numbers))} | {clean} |")
    lines += ["", "## What is left", ""]
    for row in rows:
        lines += [f"* `{row['name']}`: {fault}" for fault in faults(row)]
    lines += ["", "## One call", ""]
    for row in rows:
        lines += [f"* `{row['name']}`: {call}" for call in calls(row)]
    lines += ["", "## No channel may go", ""]
    lines += [
        f"* `{row['name']}`: {row['held'].partition(': ')[2][:200]}" for row in rows if rightly_held(row)
    ]
    lines += ["", "## All", "", "| model | weights | prunable | opaque | capture s | lower s | all s |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        row = {**row, "opaque": len(row.get("opaque", ()))}
        keys = ("name", "parameters", "share", "opaque", "capture_s", "lower_s", "seconds")
        lines.append(f"| {' | '.join(str(row.get(key, '')) for key in keys)} |")
    return "\n".join(lines) + "\n"


def version(library: str) -> str:
    try:
        return importlib.metadata.version(PACKAGES.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        return ""


def main(words: list[str]) -> None:
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {row["name"]: row for row in known}
    if words != ["--table"]:
        for module in SHARED:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        for name in MODELS:
            if not (any(word in name for word in words) if words else name not in done):
                continue
            row = one(name)
            if "broken" in row:
                print("BROKEN", name, row["broken"], flush=True)
                continue
            done[name] = row
            print(name, row.get("seconds"), *(faults(row) or ["clean"]), sep="\n    ", flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    TABLE.write_text(table([done[name] for name in MODELS if name in done]))


if __name__ == "__main__":
    main(sys.argv[1:])
