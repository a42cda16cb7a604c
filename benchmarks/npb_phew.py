"""NPB, NPB-SynFlow and PHEW: seconds and figures on the networks of the papers, one thread.

    python benchmarks/npb_phew.py [resnet20|vgg19_bn|resnet18_tiny ...]

Prints a line per network, method and sparsity: seconds of one thread (capture and all), effective nodes,
effective kernels and ln paths at spatial resolution. The DPaI paper reports, with a GPU, 430 s for NPB and
6929 s for PHEW on VGG-19 at 68.38 %.
"""

from __future__ import annotations

import sys
import time

import torch

import fxprune
from fxprune import zoo

SIDES = {"resnet20": 32, "vgg19_bn": 32, "resnet18_tiny": 64}
SPARSITIES = (0.68377, 0.9, 0.96838, 0.99)
METHODS = {"npb": {"budget": "erk"}, "phew": {}, "npb-synflow": {"resolution": "channel"}}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or list(SIDES):
        net, image = getattr(zoo, name)(), torch.ones(1, 3, SIDES[name], SIDES[name])
        for method, options in METHODS.items():
            for sparsity in SPARSITIES:
                start = time.process_time()
                pruned = fxprune.apply(net, method, sparsity, example_inputs=image, progress=False, **options)
                seconds = time.process_time() - start
                report = fxprune.analyze(pruned, example_inputs=image)
                print(
                    f"{name} {method} {sparsity:.3%}: {seconds:.1f} s, {report.effective_nodes} nodes, "
                    f"{report.effective_kernels} kernels, ln paths {report.log_paths:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
