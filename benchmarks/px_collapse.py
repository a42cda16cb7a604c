"""PX at 98.2 % in a hundred rounds on the zoo's networks: where scores are positive, and what becomes empty.

    python benchmarks/px_collapse.py [resnet20|vgg19_bn|resnet18_tiny ...]

Data: scikit-learn's digits, resized, ten of each class, for resnet20; normal noise for the others. Every
round, scores (float32) are held against ``reach``: a weight that lies on a path to an output that some active
path reaches must have a positive score, any other zero. A line per network says in how many rounds that was
so, the smallest positive score beside the sum of all, the smallest layer, the layers that selection emptied
until the last round, and those that are empty in the end.

Measured, one thread: resnet20 100 of 100 rounds right, the smallest positive score 1.1e-18 of all; selection
empties four of nine residual branches (blocks 3, 6, 7 and 8, both convolutions of each), and in the end no
layer is empty, with 4876 weights kept of 270,896. vgg19_bn 100 of 100, 5.1e-22, no layer is emptied, 102 s;
resnet18_tiny 100 of 100, 7.7e-24, blocks 4 to 7 are emptied, and none in the end, 203 s.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch

from fxprune import methods, zoo
from fxprune.capture import capture
from fxprune.data import balanced, digits
from fxprune.lowering import lower
from fxprune.methods import Problem
from fxprune.methods.px.output_activity import output_activities
from fxprune.paths.count import reach
from fxprune.scoring import contract
from fxprune.scoring.data import batches
from fxprune.sparsity.budget import plan
from fxprune.sparsity.collapse import dead_layers
from fxprune.sparsity.masks import dense, kept

SIDES = {"resnet20": 32, "vgg19_bn": 32, "resnet18_tiny": 64}
SPARSITY, ROUNDS = 0.982, 100


def data_for(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch for a network."""
    if name != "resnet20":
        return torch.randn(8, 3, SIDES[name], SIDES[name]), torch.arange(8)
    train, _ = digits(size=SIDES[name], channels=3)
    x, y = next(iter(balanced(train, 10)))
    return x, y


def problem_for(name: str) -> Problem:
    torch.manual_seed(0)
    net, data = getattr(zoo, name)(), data_for(name)
    gm = capture(net, data[0])
    graph = lower(gm)
    weights = {label: net.get_parameter(label).detach() for label in graph.kernels}
    budget = plan("global", SPARSITY, {label: tuple(weight.shape) for label, weight in weights.items()})
    return Problem(model=gm, graph=graph, weights=weights, masks=dense(weights), budget=budget, data=data)


class Checked:
    """Selection that looks at what it is given first."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.select = problem, contract.select
        self.right, self.smallest, self.empty = 0, 1.0, list[str]()

    def __call__(self, scores: Any, *args: Any, within: Any, **options: Any) -> Any:
        problem = self.problem
        activity = output_activities(problem, within, batches(problem, 1, "px"))[0].values
        head = within["fc.weight"] & (activity > 0)[:, None]
        on_path = reach(problem.graph, within | {"fc.weight": head})
        self.right += all(torch.equal(score > 0, on_path[label]) for label, score in scores.items())
        whole = float(sum(score.double().sum() for score in scores.values()))
        lowest = min(float(score[score > 0].min()) for score in scores.values() if (score > 0).any())
        self.smallest = min(self.smallest, lowest / whole)
        masks = self.select(scores, *args, within=within, **options)
        self.empty = [label for label, mask in masks.items() if not mask.any()]
        return masks


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or list(SIDES):
        problem = problem_for(name)
        checked = Checked(problem)
        contract.select = checked  # type: ignore[assignment]
        start = time.process_time()
        masks = methods.get("px", rounds=ROUNDS).find(problem)
        contract.select = checked.select
        numbers = kept(masks)
        dead = dead_layers(problem.graph, reach(problem.graph, masks))
        print(
            f"{name}: scores are positive exactly on active paths in {checked.right} of {ROUNDS} rounds, the "
            f"smallest {checked.smallest:.1e} of all; {sum(numbers.values())} weights kept of "
            f"{sum(mask.numel() for mask in masks.values())}, {min(numbers.values())} in the smallest layer; "
            f"selection emptied {', '.join(checked.empty) or 'none'}; empty in the end: "
            f"{', '.join(dead) or 'none'}; {time.process_time() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
