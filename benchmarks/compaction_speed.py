"""Measure what compaction costs and what it gives: seconds, memory, latency beside MACs, and the peers.

Parts, all or those named; each prints its rows and writes them to a file next to this script, from which
docs/compaction_speed.md is made:

    OMP_NUM_THREADS=1 python benchmarks/compaction_speed.py
    OMP_NUM_THREADS=1 python benchmarks/compaction_speed.py latency synflow cost depth groups memory simplify
    python benchmarks/compaction_speed.py --table
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune.latency import bench

HERE = Path(__file__).parent
RESULTS = HERE / "compaction_speed.jsonl"
TABLE = HERE.parent / "docs" / "compaction_speed.md"
HALVED = (
    "resnet50", "efficientnet_b0", "convnext_tiny", "vit_small_patch16_224", "swin_tiny_patch4_window7_224"
)  # fmt: skip
SIMPLIFIED = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "mobilenet_v2", "densenet121", "squeezenet1_0",
    "googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small",
)  # fmt: skip
GROUPED = ("resnet50", "convnext_tiny", "efficientnet_b0", "swin_tiny_patch4_window7_224")
X = torch.zeros(1, 3, 224, 224)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def compared(dense: nn.Module, small: nn.Module, runtimes: tuple[str, ...]) -> dict[str, Any]:
    """Medians in turn, and the ratios to the dense network."""
    result = bench({"dense": dense, "compact": small}, X, runtimes=runtimes, threads=1, seconds=12)
    row: dict[str, Any] = {}
    for runtime in runtimes:
        times = {name: result.timing(name, runtime).median for name in ("dense", "compact")}
        row[runtime] = {
            **{k: round(v, 2) for k, v in times.items()},
            "ratio": times["compact"] / times["dense"],
        }
    macs = {name: result.networks[name].macs for name in ("dense", "compact")}
    parameters = {name: result.networks[name].parameters for name in ("dense", "compact")}
    return {**row, "macs": macs["compact"] / macs["dense"], "parameters": list(parameters.values())}


def latency(rows: Callable[..., None]) -> None:
    """Half of the MACs as channels, by magnitude: the latency that is left, plain and with round_to=8."""
    for name in HALVED:
        for rounding in (1, 8):
            dense = made(name)
            pruned = fxprune.apply(
                dense, "magnitude", 0.5, example_inputs=X, granularity="channel", of="macs",
                round_to=rounding, progress=False,
            )  # fmt: skip
            found = compared(dense, fxprune.compact(pruned), ("eager", "onnxruntime"))
            rows(model=name, round_to=rounding, **found)


def synflow(rows: Callable[..., None]) -> None:
    """resnet50 under unstructured SynFlow masks."""
    for sparsity in (0.9, 0.98):
        dense = made("resnet50")
        pruned = fxprune.apply(dense, "synflow", sparsity, example_inputs=X, progress=False)
        rows(model="resnet50", sparsity=sparsity, **compared(dense, fxprune.compact(pruned), ("eager",)))


def cost(rows: Callable[..., None]) -> None:
    """CPU seconds of compact."""
    for name in ("resnet50", "vit_large_patch16_224"):
        pruned = fxprune.apply(
            made(name), "magnitude", 0.5, example_inputs=X, granularity="channel", progress=False
        )
        for verify in (True, False):
            start = time.process_time()
            fxprune.compact(pruned, verify=verify)
            rows(model=name, verify=verify, seconds=round(time.process_time() - start, 2))


def memory(rows: Callable[..., None]) -> None:
    """Peak memory of compact over the weights, in a process of its own, against one without compact."""
    for name in ("resnet50", "vit_large_patch16_224"):
        peaks = []
        for call in ("", "fxprune.compact(pruned, verify=False)", "fxprune.compact(pruned)"):
            text = (
                "import resource, timm, torch, fxprune\n"
                f"pruned = fxprune.apply(timm.create_model({name!r}).eval(), 'magnitude', 0.5,"
                " example_inputs=torch.zeros(1, 3, 224, 224), granularity='channel', progress=False)\n"
                "import gc; gc.collect()\n"
                "open('/proc/self/clear_refs', 'w').write('5')\n"
                f"{call}\n"
                "peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]\n"
                "print(int(peak) * 1024)"
            )
            out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
            peaks.append(int(out.stdout.split()[-1]))
        weights = sum(p.numel() * p.element_size() for p in made(name).parameters())
        rows(
            model=name, weights=weights, unverified=(peaks[1] - peaks[0]) / weights,
            verified=(peaks[2] - peaks[0]) / weights,
        )  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.norm(self.one(x)).relu())


def depth(rows: Callable[..., None]) -> None:
    """CPU seconds of compact for residual networks of growing depth, and the exponent of a power law."""
    points = []
    for blocks in (16, 32, 64, 128, 256):
        torch.manual_seed(0)
        x = torch.zeros(1, 8, 8, 8)
        net = nn.Sequential(*[Block() for _ in range(blocks)]).eval()
        pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=x, granularity="channel", progress=False)
        start = time.process_time()
        fxprune.compact(pruned)
        points.append((5 * blocks, time.process_time() - start))
        rows(nodes=points[-1][0], seconds=round(points[-1][1], 3))
    logs = [(math.log(n), math.log(s)) for n, s in points]
    mean = [sum(part) / len(logs) for part in zip(*logs, strict=True)]
    slope = sum((a - mean[0]) * (b - mean[1]) for a, b in logs) / sum((a - mean[0]) ** 2 for a, _ in logs)
    rows(exponent=round(slope, 3))


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def groups(rows: Callable[..., None]) -> None:
    """Finding and masking channels by magnitude beside torch-pruning: CPU seconds in turn, medians of 5.

    In a copy of the model, as is the default here, and in the model itself, as torch-pruning does.
    """
    for name in GROUPED:
        times: dict[str, list[float]] = {"ours": [], "ours_in_place": [], "torch_pruning": []}
        for _ in range(5):
            for key, returns in (("ours", "graph"), ("ours_in_place", "inplace")):
                run = partial(
                    fxprune.apply, made(name), "magnitude", 0.5, example_inputs=X, granularity="channel",
                    on_collapse="warn", progress=False, returns=returns,
                )  # fmt: skip
                times[key].append(seconds(run))
            try:
                times["torch_pruning"].append(seconds(partial(peer_pruned, made(name))))
            except (RuntimeError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
                rows(model=name, peer_error=f"{type(error).__name__}: {error}"[:120])
                times["torch_pruning"].append(math.nan)
        medians = {key: round(median(values), 2) for key, values in times.items()}
        ratio = median(times["ours"]) / median(times["torch_pruning"])
        in_place = median(times["ours_in_place"]) / median(times["torch_pruning"])
        rows(model=name, **medians, ratio=round(ratio, 2), ratio_in_place=round(in_place, 2))


def peer_pruned(model: nn.Module) -> None:
    """Let torch-pruning take 30 % of the channels of a model, over all layers."""
    import torch_pruning

    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = torch_pruning.pruner.BasePruner(
        model, X, importance=torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=0.3,
        global_pruning=True, num_heads=heads, ignored_layers=last,
    )  # fmt: skip
    pruner.step()


def filters(model: nn.Module) -> int:
    """The output channels of all convolutions and linear layers."""
    return sum(
        len(module.weight)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    )


def zeroed(name: str, way: str) -> nn.Module:
    """A torchvision classifier, pruned by torch: half of all filters, or nearly all weights."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if way == "filters 50 %":
        for layer in layers:
            prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    else:
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.98)
    for layer in layers:
        prune.remove(layer, "weight")
    return model


def simplify(rows: Callable[..., None]) -> None:
    """torch-simplify on torchvision's classifiers: channels and parameters that both leave.

    The peer keeps residual streams as wide as they were, and scatters the outputs of the layers before them:
    it counts fewer outputs there, and more parameters. Constants under zero padding become maps of biases in
    it, which hold for one size of images. A network without a path is refused here.
    """
    from simplify import simplify as peer

    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in SIMPLIFIED:
        for way in ("filters 50 %", "weights 98 %"):
            model = zeroed(name, way)
            row: dict[str, Any] = {"model": name, "way": way, "before": filters(model)}
            with torch.no_grad():
                expected = model(x)
            calls: dict[str, Callable[[], nn.Module]] = {
                "ours": lambda model=model: fxprune.compact(model, x),
                "peer": lambda name=name, way=way: peer(zeroed(name, way), torch.zeros(1, 3, 224, 224)),
            }
            for who, call in calls.items():
                try:
                    small = call()
                    with torch.no_grad():
                        apart = float((small(x) - expected).abs().max() / expected.abs().max())
                    left = sum(p.numel() for p in small.parameters())
                    row |= {who: filters(small), f"{who}_parameters": left, f"{who}_difference": apart}
                except (RuntimeError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
                    row |= {who: f"{type(error).__name__}: {error}"[:60].replace("\n", " ")}
            rows(**row)


PARTS = {
    "latency": latency,
    "synflow": synflow,
    "cost": cost,
    "memory": memory,
    "depth": depth,
    "groups": groups,
    "simplify": simplify,
}


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write docs/compaction_speed.md from the last run of each part."""
    lines = [
        "# Compaction: its cost and its gain",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/compaction_speed.py`",
    ]
    for part, function in PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if not own:
            continue
        keys = list(
            dict.fromkeys(key for row in own for key in row if key not in ("part", "torch", "threads"))
        )
        lines += ["", f"## {part}", "", inspect.cleandoc(function.__doc__ or ""), ""]
        lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in own]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['dense']} -> {value['compact']} ms ({1 / value['ratio']:.2f}x)"
    if isinstance(value, list):
        return " -> ".join(f"{item:,}" for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def add(rows: list[dict[str, Any]], part: str, **row: Any) -> None:
    """Keep a row, and print it."""
    rows.append({"part": part, **row})
    print(json.dumps(rows[-1]), flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for part in [] if options.table else options.parts or PARTS:
        rows = [row for row in rows if row["part"] != part]
        PARTS[part](partial(add, rows, part))
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_table(rows)


if __name__ == "__main__":
    main()
