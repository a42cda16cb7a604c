"""Prune trained networks to a share of their MACs, fine-tune and measure: accuracy against milliseconds.

Every cell (network, seed, share, tool, criterion, scope) goes to a file next to this script as it is done, so
that a run goes on where it was stopped. Networks are trained dense once for each seed, and kept outside of
the repository. torch-pruning prunes the same networks, with the same fine-tuning, in the same run:

    python benchmarks/structured.py FOLDER                                # all (days on two cores)
    python benchmarks/structured.py FOLDER --networks resnet20 --shares 0.5 --seeds 0
    python benchmarks/structured.py --table                               # only write docs/structured.md

torch-pruning is `pip install torch-pruning`.
FOLDER has the files of Fashion-MNIST (Debian: dataset-fashion-mnist, /usr/share/datasets/fashion-mnist).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

HERE = Path(__file__).parent
RESULTS = HERE / "structured.jsonl"
PAGE = HERE.parent / "docs" / "structured.md"
CHECKPOINTS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune" / "structured"
BATCH = 128
SHARES = (0.5, 0.25, 0.12)
SCOPES = ("global", "isomorphic")
OURS = ("magnitude", "group-norm", "fpgm", "bn-scale", "lamp", "taylor", "obd", "random",
        "magnitude, family", "lamp, family", "taylor, family", "obd, family")  # fmt: skip
"""Criteria; "family": with scores in units of their mean over the family of tied layers."""
THEIRS = ("magnitude", "taylor", "hessian", "group-norm")
KEY = ("network", "seed", "share", "tool", "criterion", "scope", "epochs", "images")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": fxprune.zoo.resnet20,
    "vit": lambda: timm.models.VisionTransformer(
        img_size=28, patch_size=4, num_classes=10, embed_dim=96, depth=6, num_heads=4
    ),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
}

HEAD = "| tool | criterion | scope | seeds | accuracy | untuned | MACs | parameters | speed-up | prune (s) |"

Images = tuple[Tensor, Tensor]


def main() -> None:
    given = _arguments()
    if not given.table:
        train, test = (part.tensors for part in fxprune.data.fashion_mnist(given.folder, channels=3))
        for network in given.networks:
            for seed in given.seeds:
                dense = trained(network, seed, train, given.epochs, given.images)
                right = accuracy(dense, test)
                for share in given.shares:
                    for tool, criterion, scope in _ways(given):
                        cell = (network, seed, share, tool, criterion, scope, given.epochs, given.images)
                        facts = dict(zip(KEY, cell, strict=True))
                        if not any(all(row[name] == facts[name] for name in KEY) for row in rows()):
                            row = {**facts, **measured(dense, right, facts, train, test)}
                            with RESULTS.open("a", encoding="utf-8") as file:
                                file.write(json.dumps(row) + "\n")
                            print(row, flush=True)
    PAGE.write_text(page(), encoding="utf-8")


def _ways(given: argparse.Namespace) -> list[tuple[str, str, str]]:
    ours = [("fxprune", name, scope) for name in given.ours for scope in given.scopes]
    return ours + [("torch-pruning", name, scope) for name in given.theirs for scope in given.scopes]


def _arguments() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", nargs="?", default="/usr/share/datasets/fashion-mnist")
    words.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    words.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    words.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    words.add_argument("--scopes", nargs="+", default=list(SCOPES))
    words.add_argument("--ours", nargs="*", default=list(OURS))
    words.add_argument("--theirs", nargs="*", default=list(THEIRS))
    words.add_argument("--epochs", type=int, default=3, help="of the dense training")
    words.add_argument("--images", type=int, default=60_000, help="of an epoch of the dense training")
    words.add_argument("--table", action="store_true")
    return words.parse_args()


# -- training -----------------------------------------------------------------------------------------------
def trained(name: str, seed: int, train: Images, epochs: int, images: int) -> nn.Module:
    """The dense network of a seed, trained or read."""
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    file = CHECKPOINTS / f"{name}-{seed}-{epochs}-{images}.pt"
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
        return network
    network.to(memory_format=torch.channels_last)  # faster on a CPU; timed in the usual format
    fit(network, train, epochs, images, 2e-3, seed)
    network.to(memory_format=torch.contiguous_format)
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), file)
    return network


def fit(network: nn.Module, data: Images, epochs: int, images: int, rate: float, seed: int) -> None:
    """AdamW with one cycle of the rate.

    Narrow networks stay in the usual format: in channels_last the backward pass of a convolution from 5 to 11
    channels with one tap and stride 2 overwrites memory in PyTorch 2.15 on some CPUs.
    """
    steps = epochs * (images // BATCH)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(data[0]), generator=generator)[:images]
        for chosen in order.split(BATCH)[: images // BATCH]:
            optimiser.zero_grad()
            F.cross_entropy(network(data[0][chosen]), data[1][chosen]).backward()
            optimiser.step()
            rates.step()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: Images) -> float:
    network.eval()
    right = sum(
        int((network(x).argmax(1) == y).sum())
        for x, y in zip(data[0].split(500), data[1].split(500), strict=True)
    )
    return right / len(data[1])


# -- one cell -----------------------------------------------------------------------------------------------
def measured(
    dense: nn.Module, right: float, cell: dict[str, Any], train: Images, test: Images
) -> dict[str, Any]:
    """Prune, fine-tune and measure one network."""
    x = train[0][:1]
    start = time.perf_counter()
    prune = ours if cell["tool"] == "fxprune" else theirs
    try:
        small = prune(dense, cell, train)
    except Exception as error:  # a tool that fails is a result
        return {"error": f"{type(error).__name__}: {str(error)[:160]}"}
    seconds = time.perf_counter() - start
    before = accuracy(small, test)
    fit(small, train, 1, 10_000, 1e-3, cell["seed"])
    found = fxprune.bench({"dense": dense, "small": small}, x, threads=1, seconds=1.0)
    whole, left = found.networks["dense"], found.networks["small"]
    return {
        "accuracy": accuracy(small, test),
        "accuracy_before_tuning": before,
        "dense_accuracy": right,
        "macs": left.macs / whole.macs,
        "parameters": left.parameters / whole.parameters,
        "ms": found.timing("small").median,
        "dense_ms": found.timing("dense").median,
        "prune_seconds": seconds,
    }


def batches(data: Images, seed: int, number: int = 4) -> list[Images]:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    return [(data[0][chosen], data[1][chosen]) for chosen in order.split(BATCH)[:number]]


def ours(dense: nn.Module, cell: dict[str, Any], train: Images) -> nn.Module:
    criterion, _, normalize = cell["criterion"].partition(", ")
    options = {"normalize": normalize or "none"}
    pruned = fxprune.apply(
        dense.eval(), criterion, 1 - cell["share"], granularity="channel", of="macs", **options,
        scope=cell["scope"], example_inputs=train[0][:2], data=batches(train, cell["seed"]),
        loss_fn=F.cross_entropy, seed=cell["seed"], progress=False,
    )  # fmt: skip
    return fxprune.compact(pruned, exact=False)  # it is trained on: plain norms over what is left


def theirs(dense: nn.Module, cell: dict[str, Any], train: Images) -> nn.Module:
    """torch-pruning: many small steps, until the multiply-adds are few enough."""
    import copy

    import torch_pruning as tp

    network, x = copy.deepcopy(dense).eval(), train[0][:1]
    importance = {
        "magnitude": lambda: tp.importance.MagnitudeImportance(p=2, group_reduction="first"),
        "group-norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }[cell["criterion"]]()
    head = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    heads = {m.qkv: m.num_heads for m in network.modules() if hasattr(m, "qkv")}
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    pruner = tp.pruner.BasePruner(
        network, x, importance=importance, global_pruning=True, isomorphic=cell["scope"] == "isomorphic",
        pruning_ratio=1.0, iterative_steps=200, ignored_layers=head, num_heads=heads,
    )  # fmt: skip
    whole, _ = tp.utils.count_ops_and_params(network, x)
    data = batches(train, cell["seed"])
    for _ in range(200):
        _gradients(network, importance, cell["criterion"], data)
        pruner.step()
        for module in heads:
            _set_widths(network, module)
        left, _ = tp.utils.count_ops_and_params(network, x)
        if left <= cell["share"] * whole:
            return network
    raise RuntimeError(f"{left / whole:.2f} of the multiply-adds are left after 200 steps")


def _set_widths(network: nn.Module, qkv: nn.Module) -> None:
    """Tell an attention of timm how wide its heads are now, as torch-pruning leaves to its user."""
    attention: Any = next(module for module in network.modules() if getattr(module, "qkv", None) is qkv)
    attention.attn_dim = attention.qkv.out_features // 3
    attention.head_dim = attention.attn_dim // attention.num_heads


def _gradients(network: nn.Module, importance: Any, criterion: str, data: list[Images]) -> None:
    """The gradients that an importance looks at, as torch-pruning's examples find them."""
    if criterion not in ("taylor", "hessian"):
        return
    network.zero_grad()
    x, y = data[0]
    if criterion == "taylor":
        F.cross_entropy(network(x), y).backward()
        return
    importance.zero_grad()
    for loss in F.cross_entropy(network(x[:32]), y[:32], reduction="none"):
        network.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(network)


# -- the page -----------------------------------------------------------------------------------------------
def rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


Cells = list[dict[str, Any]]


def page() -> str:
    """The tables of docs/structured.md."""
    every: dict[tuple[Any, ...], Cells] = {}
    for row in rows():
        every.setdefault((row["network"], row["share"], row["epochs"], row["images"]), []).append(row)
    seeds = sorted({row["seed"] for row in rows()})
    lines = [
        "# Structured pruning on Fashion-MNIST",
        "",
        "Written by `benchmarks/structured.py` from `benchmarks/structured.jsonl`. Networks are trained",
        "dense, pruned to a share of their multiply-adds, fine-tuned with 10,000 images, measured in eager",
        "PyTorch at batch 1 on one thread. Cells of several seeds are means, with the number of seeds.",
        "Milliseconds were measured in turn with the dense network: compare the speed-ups, not the times.",
        "At 28 x 28 pixels a MobileNet takes under a million multiply-adds, and the calls of its layers all",
        "of the time: no pruning makes them fewer.",
        'fxprune compacts with `exact=False`, as the network is trained on. "family": scores relative to',
        "their mean over the family of tied layers, which magnitude, taylor and obd take by themselves under",
        '`scope="isomorphic"`; the rows without it are of `normalize="none"`.',
        f"Seeds so far: {', '.join(map(str, seeds))}. With one, a point of accuracy says nothing: a random",
        "choice is behind the best by less than that in one of the tables. Cells that are not here have not",
        "been run.",
        "",
        "## The best of each tool",
        "",
        "| network | MACs | dense | fxprune | torch-pruning |",
        "|---|---|---|---|---|",
    ]
    for (network, share, *_), cells in every.items():
        dense = statistics.mean(row["dense_accuracy"] for row in cells if "error" not in row)
        best = [_best(cells, tool) for tool in ("fxprune", "torch-pruning")]
        lines.append(f"| {network} | {share:.0%} | {dense:.2%} | {' | '.join(best)} |")
    lines += ["", "## Criteria on average", "", *_averages(every)]
    for (network, share, epochs, images), cells in every.items():
        lines += _table(network, share, f"{epochs} epochs of {images:,} images", cells)
    return "\n".join(lines) + "\n"


def _ways_of(cells: Cells) -> dict[tuple[str, ...], Cells]:
    """The cells that did not fail, by tool, criterion and scope."""
    ways: dict[tuple[str, ...], Cells] = {}
    for row in cells:
        ways.setdefault((row["tool"], row["criterion"], row["scope"]), []).append(row)
    return {way: own for way, own in ways.items() if all("error" not in row for row in own)}


def _best(cells: Cells, tool: str) -> str:
    ways = {way: own for way, own in _ways_of(cells).items() if way[0] == tool}
    if not ways:
        return "not run"
    way = max(ways, key=lambda way: _mean(ways[way], "accuracy"))
    return f"{_mean(ways[way], 'accuracy'):.2%} ({way[1]}, {way[2]})"


def _averages(every: dict[tuple[Any, ...], Cells]) -> list[str]:
    """The mean accuracy over all networks and shares in which all of the listed ways were run."""
    tables = [_ways_of(cells) for cells in every.values()]
    counts = {way: sum(way in table for table in tables) for table in tables for way in table}
    most = max(counts.values())
    common = [way for way, count in counts.items() if count == most]
    means = {way: statistics.mean(_mean(table[way], "accuracy") for table in tables if way in table)
             for way in common}  # fmt: skip
    lines = [f"Over the {most} settings that all of these were run in.", ""]
    lines += ["| tool | criterion | scope | accuracy |", "|---|---|---|---|"]
    for way in sorted(means, key=lambda way: -means[way]):
        lines.append(f"| {' | '.join(way)} | {means[way]:.2%} |")
    return lines


def _table(network: str, share: float, training: str, cells: Cells) -> list[str]:
    dense = statistics.mean(row["dense_accuracy"] for row in cells if "error" not in row)
    lines = ["", f"## {network}, {share:.0%} of the MACs", "", f"Dense: {dense:.2%} after {training}.", ""]
    lines += [HEAD, "|---|---|---|---|---|---|---|---|---|---|"]
    good = _ways_of(cells)
    for way in sorted(good, key=lambda way: -_mean(good[way], "accuracy")):
        own = good[way]
        speed = statistics.mean(row["dense_ms"] / row["ms"] for row in own)
        lines.append(
            f"| {' | '.join(way)} | {len(own)} | {_mean(own, 'accuracy'):.2%} "
            f"| {_mean(own, 'accuracy_before_tuning'):.2%} | {_mean(own, 'macs'):.1%} "
            f"| {_mean(own, 'parameters'):.1%} | {speed:.2f} x | {_mean(own, 'prune_seconds'):.1f} |"
        )
    for row in cells:
        if "error" in row:
            way = (row["tool"], row["criterion"], row["scope"])
            lines.append(f"| {' | '.join(way)} | failed: {row['error']} |||||||")
    return lines


def _mean(cells: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in cells)


if __name__ == "__main__":
    main()
