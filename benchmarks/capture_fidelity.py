"""Is every captured model the model itself? The smallest of every timm class, and torchvision's classifiers.

Each is built with random weights at the smallest image size that it accepts, with dropout and stochastic
depth switched on where its constructor takes them. Compared are: outputs in evaluation at batch sizes 1 and
3 (captured at 2), outputs, random numbers drawn, gradients of every parameter and all buffers after one
training step, and the keys of the state dict.

Run by hand; prints a line per model and the totals:

    python benchmarks/capture_fidelity.py            # everything (about half an hour on one core)
    python benchmarks/capture_fidelity.py swin vit   # names that contain one of these
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from capture.faithful import assert_faithful

SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
DROPS = {
    "drop_rate": 0.1,
    "drop_path_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
    "pos_drop_rate": 0.1,
    "patch_drop_rate": 0.25,
    "stochastic_depth_prob": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
Maker = Callable[..., nn.Module]


def timm_representatives() -> list[str]:
    """The smallest model, by parameters, of every (module, class) pair of timm."""
    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        key = type(model).__module__, type(model).__name__
        smallest[key] = min(smallest.get(key, (size, name)), (size, name))
    return sorted(name for _, name in smallest.values())


def built(make: Maker, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model with as many of ``options`` as its constructor takes."""
    options = dict(options)
    while True:
        try:
            return make(**options), options
        except TypeError as error:
            refused = set(re.findall(r"'(\w+)'", str(error))) & options.keys()
            if not refused:
                raise
            options = {key: value for key, value in options.items() if key not in refused}


def reduced(make: Maker) -> tuple[nn.Module, int]:
    """The model for the smallest image that it runs on in both modes, with real weights."""
    problem: BaseException = ValueError("no size fits")
    for size in SIZES:
        for sized in ({"img_size": size}, {"image_size": size}, {}, {"patch_drop_rate": 0.0}):
            try:
                model, options = built(make, {**DROPS, "num_classes": 10, **sized})
                if sized and not sized.keys() & options.keys():
                    continue
                for mode in (False, True):
                    with torch.no_grad():
                        model.train(mode)(torch.randn(2, 3, size, size))
                return built(make, options)[0], size
            except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError, TypeError) as e:
                problem = e
    raise problem


def check(name: str, make: Maker) -> str:
    """One line about one model; it starts with "ok" if all is equal."""
    torch.manual_seed(0)
    started = time.perf_counter()
    size = 0
    try:
        model, size = reduced(make)
        assert_faithful(model, (3, size, size), strict=False)
        verdict = "ok"
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        verdict = f"FAILED {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"{verdict:8} {name} at {size} ({time.perf_counter() - started:.0f} s)"


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    makers: dict[str, Maker] = {}
    for name in timm_representatives():
        makers[f"timm:{name}"] = lambda name=name, **options: timm.create_model(name, **options)
    for name in torchvision.models.list_models(torchvision.models):
        makers[f"torchvision:{name}"] = lambda name=name, **options: torchvision.models.get_model(
            name, weights=None, **options
        )
    lines = []
    for name, make in makers.items():
        if not words or any(word in name for word in words):
            lines.append(check(name, make))
            print(lines[-1], flush=True)
    print(f"{sum(line.startswith('ok') for line in lines)} of {len(lines)} equal")


if __name__ == "__main__":
    main(sys.argv[1:])
