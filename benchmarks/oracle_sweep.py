"""Are the effective weights exactly the oracle's, on every architecture of timm?

The smallest model of every timm class, at the smallest image size that it takes; random masks at 50 %, 95 %
and 99.5 % sparsity, three seeds each. At ``resolution="spatial"`` the effective weights must be equal to the
oracle's, at ``"channel"`` a superset, and equal to the oracle's on periodic images. One line per model and
the totals; finished models are kept in a file next to this script, so that a run goes on where it was
stopped:

    python benchmarks/oracle_sweep.py              # all (about two hours on one core)
    python benchmarks/oracle_sweep.py swin vit     # names that contain one of these
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracle import effective_parameters, random_masks
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.paths.count import reach

HERE = Path(__file__).parent
RESULTS = HERE / "oracle_sweep.jsonl"
REPRESENTATIVES = HERE.parent / "tests" / "representatives.json"
DENSITIES = (0.5, 0.05, 0.005)
SEEDS = (0, 1, 2)


def build(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """The model, for images of this size where its constructor or its forward allows another than its own."""
    config = timm.get_pretrained_cfg(name)
    channels = config.input_size[0] if config is not None else 3
    image = torch.randn(2, channels, size, size)
    try:
        model = timm.create_model(name, img_size=size)
    except TypeError:
        model = timm.create_model(name)
    return model.eval(), image


def weight_count(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def without_dead_taps(graph: ChannelGraph) -> ChannelGraph:
    """On a periodic image no tap sees padding."""
    ops = tuple(
        dataclasses.replace(op, live_taps=None) if getattr(op, "live_taps", None) is not None else op
        for op in graph.ops
    )
    return dataclasses.replace(graph, ops=ops, programs={})


def differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    return [
        f"{key} {int(got[key].sum())}/{int(want[key].sum())}"
        for key in got
        if not torch.equal(got[key], want[key])
    ]


def check(name: str, size: int) -> dict[str, Any]:
    """All comparisons of one model."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, image = build(name, size)
    graph = lower(capture(model, image))
    periodic = without_dead_taps(graph)
    lowered = time.perf_counter() - start
    wrong: list[str] = []
    compared = 0
    for density in DENSITIES:
        for seed in SEEDS:
            masks = random_masks(model, density, seed)
            wanted = effective_parameters(model, image, masks, dtype=torch.float32)
            wrong += [f"spatial {density} {seed} {w}" for w in differing(reach(graph, masks), wanted)]
            channel = reach(graph, masks, resolution="channel")
            missing = [key for key in wanted if (wanted[key] & ~channel[key]).any()]
            wrong += [f"channel misses {density} {seed} {key}" for key in missing]
            wanted = effective_parameters(model, image, masks, padding="circular", dtype=torch.float32)
            channel = reach(periodic, masks, resolution="channel")
            wrong += [f"periodic {density} {seed} {w}" for w in differing(channel, wanted)]
            compared += 3
    return {
        "name": name,
        "size": size,
        "opaque": [op.reason for op in graph.opaque],
        "compared": compared,
        "wrong": wrong,
        "lower_s": round(lowered, 2),
        "total_s": round(time.perf_counter() - start, 1),
    }


def main(patterns: list[str]) -> None:
    torch.set_num_threads(1)
    sizes: dict[str, int] = json.loads(REPRESENTATIVES.read_text())
    done = (
        {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
        if RESULTS.exists()
        else {}
    )
    for name in sorted(sizes, key=weight_count):  # the quick ones first
        size = sizes[name]
        if (patterns and not any(pattern in name for pattern in patterns)) or (name in done and not patterns):
            continue
        try:
            row = check(name, size)
        except (RuntimeError, ValueError, TypeError) as error:
            row = {
                "name": name,
                "size": size,
                "error": f"{type(error).__name__}: {error}"[:300],
                "compared": 0,
            }
        done[name] = row
        print(json.dumps(row)[:600], flush=True)
        RESULTS.write_text("".join(json.dumps(done[key]) + "\n" for key in sorted(done)))
    rows = list(done.values())
    compared = sum(row["compared"] for row in rows)
    counts = [sum(bool(row.get(key)) for row in rows) for key in ("wrong", "error", "opaque")]
    print(f"{len(rows)} models, {compared} comparisons; models with mismatches, errors, opaque ops: {counts}")


if __name__ == "__main__":
    main(sys.argv[1:])
