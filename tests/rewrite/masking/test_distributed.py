"""Two processes: data parallel and fully sharded training equal training in one."""

import socket

import pytest
import torch.multiprocessing

from rewrite import workers


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.spawn(workers.run, args=(port,), nprocs=workers.WORLD, join=False)
    try:
        while not context.join(timeout=90):
            pass
    finally:
        for process in context.processes:
            process.kill()
    assert all(process.exitcode == 0 for process in context.processes)
