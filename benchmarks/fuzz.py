"""Random networks, as many as asked for: capture fidelity, the oracle's answers, exact counts, masks.

    python benchmarks/fuzz.py                 # 5000 networks (about twenty minutes on one core)
    python benchmarks/fuzz.py 20000 --seed 7  # more, other ones

A failure is printed with the architecture that rebuilds it and the network; it belongs, under a name, into
``tests/graph/test_regressions.py``. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from lowering.strategies import STARTS, Architecture
from lowering.whole import assert_whole

DENSITIES = (1.0, 0.8, 0.6, 0.4, 0.2)


def draw(rng: random.Random) -> tuple[Architecture, float, int]:
    blocks = tuple(rng.randrange(2**16) for _ in range(rng.randint(1, 8)))
    return Architecture(rng.choice(sorted(STARTS)), blocks), rng.choice(DENSITIES), rng.randrange(4)


def main(count: int, seed: int) -> int:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    start, failures, weights = time.perf_counter(), 0, 0
    for i in range(count):
        architecture, density, mask_seed = draw(rng)
        model, example = architecture.build()
        weights += sum(parameter.numel() for parameter in model.parameters())
        try:
            assert_whole(model, example, density, mask_seed)
        except (AssertionError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            failures += 1
            print(f"\n{architecture!r}, density {density}, seed {mask_seed}\n{model}")
            traceback.print_exc(file=sys.stdout)
        if (i + 1) % 250 == 0:
            print(f"{i + 1} networks, {failures} failures, {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    print(f"{count} networks, {weights} parameters, {failures} failures, {seconds:.0f} s (seed {seed})")
    return min(failures, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, nargs="?", default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.count, arguments.seed))
