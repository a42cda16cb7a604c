"""Does the cost of capture and lowering grow linearly with the graph?

Residual networks of growing depth; CPU seconds of capture, of lowering and of compiling the traversal, per
node, and the exponent of a power law fitted to them (1 is linear):

    python benchmarks/scaling.py
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.program import compile_graph


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.norm(self.one(x)).relu())


def seconds(blocks: int) -> tuple[int, float, float, float]:
    """Graph nodes, and the CPU seconds of the three stages."""
    model, marks = nn.Sequential(*[Block() for _ in range(blocks)]), [time.process_time()]
    gm = capture(model, torch.zeros(2, 4, 8, 8))
    marks.append(time.process_time())
    graph = lower(gm)
    marks.append(time.process_time())
    compile_graph(graph, "spatial")
    marks.append(time.process_time())
    return len(gm.graph.nodes), marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def exponent(xs: list[int], ys: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    rise = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return rise / sum((a - mean_u) ** 2 for a in u)


def main() -> None:
    torch.set_num_threads(1)
    seconds(10)
    rows = [seconds(blocks) for blocks in (50, 100, 200, 400, 800, 1600)]
    print(f"{'nodes':>8} {'capture':>9} {'lower':>9} {'compile':>9}   milliseconds per node")
    for nodes, *times in rows:
        print(f"{nodes:8d} " + " ".join(f"{t:8.2f}s" for t in times) + f"   {1e3 * sum(times) / nodes:.2f}")
    for stage, name in enumerate(("capture", "lower", "compile"), start=1):
        power = exponent([row[0] for row in rows], [row[stage] for row in rows])
        print(f"{name}: seconds ~ nodes ^ {power:.2f}")


if __name__ == "__main__":
    main()
