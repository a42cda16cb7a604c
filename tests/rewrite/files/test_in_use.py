"""Compact networks in use: compiled, copied, pickled, exported, trained by one process and by two."""

import copy
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import NETS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxprune

KINDS = ["residual", "vit", "norms", "grouped"]


def compacted(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = NETS[kind]()
    masked = fxprune.apply(
        model.eval(), "magnitude", 0.3, granularity="channel", example_inputs=inputs, progress=False
    )
    return fxprune.compact(masked), inputs


def step(network: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network(x).square().mean().backward()
    optimizer.step()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_compute_the_same_and_can_be_saved(kind: str, tmp_path: Path) -> None:
    small, x = compacted(kind)
    fresh = NETS[kind]()[0].eval()
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad():
            assert torch.equal(small(x), twin(x))
        fxprune.save(twin, tmp_path / "file")
        with torch.no_grad():
            assert torch.equal(small(x), fxprune.load(tmp_path / "file", fresh)(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_trained_loaded_and_pruned_again(kind: str, make: Any, tmp_path: Path) -> None:
    small, x = compacted(kind)
    before = [p.detach().clone() for p in small.parameters()]
    step(small.train(), x, make(small.parameters(), lr=0.05))
    assert any(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    fxprune.save(small.eval(), tmp_path / "file")
    again = fxprune.load(tmp_path / "file", NETS[kind]()[0].eval())
    with torch.no_grad():
        assert torch.equal(small(x), again(x))
    masked = fxprune.apply(again, "magnitude", 0.5, progress=False).eval()
    smaller = fxprune.compact(masked)
    with torch.no_grad():
        assert torch.allclose(masked(x), smaller(x), atol=1e-5)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_networks_compile_whole_and_export(kind: str, tmp_path: Path) -> None:
    small, x = compacted(kind)
    fxprune.save(small, tmp_path / "file")
    again = fxprune.load(tmp_path / "file", NETS[kind]()[0].eval())
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    program = torch.export.export(again, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(small(x), compiled(x), atol=1e-6)
        assert torch.allclose(small(x), program(x), atol=1e-6)


def _train(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    small = fxprune.load(path, NETS["residual"]()[0])
    wrapped = DistributedDataParallel(small)
    x = torch.randn(2, 3, 8, 8)
    step(wrapped, x, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    fxprune.save(wrapped, f"{path}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes start PyTorch each
def test_two_processes_train_a_loaded_network(tmp_path: Path) -> None:
    small, _ = compacted("residual")
    path = str(tmp_path / "file")
    fxprune.save(small, path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train, (port, path), nprocs=2)
    one, two = (fxprune.load(f"{path}.{rank}", NETS["residual"]()[0]) for rank in (0, 1))
    changed = 0
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name))
        changed += int(not torch.equal(parameter, small.get_parameter(name)))
    assert changed
