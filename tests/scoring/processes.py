"""Several processes for a test: a function runs in each, under gloo, and gives its result back."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "fxprune.methods", "fxprune.capture"])

STARTING = 120.0
"""Seconds that processes may take to start on a busy machine."""


def _run(
    function: Callable[..., Any], rank: int, world: int, folder: str, timeout: float, *args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    result: Any
    try:
        result = function(rank, *args)
    except (ValueError, RuntimeError) as error:
        result = error
    torch.save(result, Path(folder, str(rank)))
    dist.destroy_process_group()


def together(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """The results of ``function(rank, *args)`` in ``world`` processes; ``None`` of one that died."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_run, args=(function, rank, world, folder, timeout, *args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(2 * timeout + STARTING)
        found = [Path(folder, str(rank)) for rank in range(world)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in found]
