"""Compare the greedy choice of channel groups with others: the worth that is kept at equal MACs.

The worth of a group is the sum of the scores of its weights. Three ways to keep the most of it under a limit
of multiply-adds:

* greedy: by worth per cost, costs brought up to date on the way (`fxprune.sparsity.group_order.by_worth`);
* Lagrangian: keep what is worth more than a price times its cost, with costs brought up to date until nothing
  changes, the price found by bisection; then fill up greedily;
* exact: where the groups of a family cost the same, an optimum keeps the best of each family, so that all
  combinations of widths can be tried (small networks only).

    python benchmarks/selection_gap.py
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fxprune
from fxprune.channels.cost import Cost, count_macs
from fxprune.channels.groups import Groups, group_channels
from fxprune.sparsity.group_order import by_worth

SHARES = (0.5, 0.25)


def chain() -> nn.Module:
    """Three families of 12, 16 and 12 channels, at two resolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 12, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def protected(groups: Groups, worth: Tensor) -> Tensor:
    """The best group of every family stays."""
    staying = torch.zeros(groups.count, dtype=torch.bool)
    for family in torch.unique(groups.families):
        members = (groups.families == family).nonzero().flatten()
        staying[members[worth[members].argmax()]] = True
    return staying


def greedy(worth: Tensor, cost: Cost, held: Tensor, limit: float) -> Tensor:
    alive = torch.ones_like(held)
    order = by_worth(worth, cost, alive, ~held, limit)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        staying = alive.clone()
        staying[order[:middle]] = False
        low, high = (low, middle) if cost.left(staying) <= limit else (middle + 1, high)
    staying = alive.clone()
    staying[order[:low]] = False
    return staying


def filled(staying: Tensor, worth: Tensor, cost: Cost, limit: float) -> Tensor:
    """Give back what still fits, the most worth per cost first."""
    staying = staying.clone()
    for group in (~staying).nonzero().flatten()[worth[~staying].argsort(descending=True)].tolist():
        staying[group] = True
        if cost.left(staying) > limit:
            staying[group] = False
    return staying


def lagrangian(worth: Tensor, cost: Cost, held: Tensor, limit: float) -> Tensor:
    low, high = 0.0, float((worth / cost.saved(torch.ones_like(held)).clamp(min=1)).max()) * 100
    best = held.clone()
    for _ in range(40):
        price = (low + high) / 2
        staying = torch.ones_like(held)
        for _ in range(20):
            # What a group would cost if it were there, next to those that are.
            costs = cost.saved(staying)
            for group in (~staying).nonzero().flatten().tolist():
                more = staying.clone()
                more[group] = True
                costs[group] = cost.left(more) - cost.left(staying)
            new = held | (worth > price * costs)
            if torch.equal(new, staying):
                break
            staying = new
        if cost.left(staying) <= limit:
            high = price
            if worth[staying].sum() > worth[best].sum():
                best = staying
        else:
            low = price
    return filled(best, worth, cost, limit)


def exact(groups: Groups, worth: Tensor, cost: Cost, limit: float) -> Tensor | None:
    families = [
        (groups.families == family).nonzero().flatten() for family in torch.unique(groups.families).tolist()
    ]
    ranked = [members[worth[members].argsort(descending=True)] for members in families]
    sizes = [range(1, len(members) + 1) for members in ranked]
    if torch.tensor([float(len(one)) for one in sizes]).prod() > 20_000:
        return None
    best, most = None, -1.0
    for widths in itertools.product(*sizes):
        staying = torch.zeros(groups.count, dtype=torch.bool)
        for members, width in zip(ranked, widths, strict=True):
            staying[members[:width]] = True
        if (value := float(worth[staying].sum())) > most and cost.left(staying) <= limit:
            best, most = staying, value
    return best


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    yield "chain", chain(), torch.randn(1, 3, 16, 16)
    yield "resnet20", fxprune.zoo.resnet20(), torch.randn(1, 3, 32, 32)


def main() -> None:
    torch.manual_seed(0)
    print("| network | MACs | greedy | Lagrangian | exact | greedy (s) | Lagrangian (s) |")
    print("|---|---|---|---|---|---|---|")
    for name, model, x in networks():
        groups = group_channels(fxprune.lower(fxprune.capture(model.eval(), x)))
        # Scores of a trained network: a few large, many small.
        worth = torch.rand(groups.count, dtype=torch.float64) ** 3
        cost = count_macs(groups)
        held = protected(groups, worth)
        for share in SHARES:
            limit = share * cost.whole
            found, seconds = [], []
            for way in (greedy, lagrangian):
                start = time.perf_counter()
                found.append(float(worth[way(worth, cost, held, limit)].sum() / worth.sum()))
                seconds.append(time.perf_counter() - start)
            best = exact(groups, worth, cost, limit)
            optimum = "" if best is None else f"{float(worth[best].sum() / worth.sum()):.2%}"
            print(
                f"| {name} | {share:.0%} | {found[0]:.2%} | {found[1]:.2%} | {optimum} "
                f"| {seconds[0]:.2f} | {seconds[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
