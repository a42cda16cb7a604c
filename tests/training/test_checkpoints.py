"""Checkpoints: whole or not at all; a run that was killed ends as if nothing had been."""

import contextlib
import hashlib
import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring.processes import CONTEXT
from thinning import one_in

from fxprune.training import Checkpoints, Pruner, checkpoints
from training import loops, nets


def killed_run(kind: str, folder: Path, lines: int, delay: float) -> list[str]:
    """Starts the loop in a process of its own and kills it ``delay`` seconds after it has said ``lines``."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=loops.in_a_process, args=(kind, folder, there))
    process.start()
    said = [here.recv() for _ in range(lines)]
    time.sleep(delay)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it was done already
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return said


@pytest.mark.parametrize("kind", one_in(2, loops.LOOPS))
def test_killed_and_resumed_is_never_killed(kind: str, tmp_path: Path) -> None:
    chance = random.Random()
    wanted = loops.LOOPS[kind](None)
    lines, delay = chance.randint(1, 5), chance.random() * 0.02
    said = killed_run(kind, tmp_path, lines, delay)
    assert said[0].startswith(kind)
    resumed: list[str] = []
    torch.manual_seed(99)  # what the process did before does not matter
    assert loops.LOOPS[kind](tmp_path, resumed.append) == wanted, (lines, delay)
    assert len(resumed) <= {"asni": loops.EPOCHS, "imp": 8}[kind] - lines, "it went on where it was"
    assert loops.LOOPS[kind](tmp_path, resumed.append) == wanted, "and finished, it stays finished"


class Stop(RuntimeError):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", loops.LOOPS)
def test_stopped_at_every_step(kind: str, tmp_path: Path) -> None:
    """The same within one process: after each step the run breaks off and starts anew."""
    wanted = loops.LOOPS[kind](None)
    steps = []

    def say(text: str) -> None:
        steps.append(text)
        raise Stop

    for _ in range(20):
        try:
            found = loops.LOOPS[kind](tmp_path, say)
            break
        except Stop:
            continue
    assert found == wanted
    assert len(steps) == len(set(steps)) == {"asni": loops.EPOCHS, "imp": 4 + 2 + 2}[kind]


def test_a_write_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path / "new")
    store.save(1, {"x": torch.ones(2)})

    def broken(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        store.save(1, {"x": torch.zeros(2)})
    number, state = store.latest() or (0, {})
    assert (number, state["x"].tolist()) == (1, [1, 1])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step-000000001.ckpt"]


@pytest.mark.parametrize("part", [0, 5, 21, 40, 60, 0.5, -1])
def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path: Path, part: float) -> None:
    store = Checkpoints(tmp_path)
    for number in (1, 2):
        store.save(number, {"x": torch.full((100,), float(number))})
    content = store.path(2).read_bytes()
    store.path(2).write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.warns(UserWarning, match=r"step-000000002.*; checkpoint 1 before it is used"):
        found = store.latest()
    assert found is not None
    assert found[1]["x"][0] == 1
    with pytest.raises(ValueError, match=r"step-000000002\.ckpt: .*(cut off|not a checkpoint)"):
        checkpoints.read(store.path(2))
    store.path(1).unlink()
    with pytest.raises(ValueError, match="no other is left"):
        store.latest()


def foreign_torch(path: Path) -> None:
    torch.save({"model": torch.ones(3)}, path)


def foreign_text(path: Path) -> None:
    path.write_text("hello")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))


def not_a_dict(path: Path) -> None:
    checkpoints.write(path, {"x": 1})
    content = path.read_bytes()
    buffer = io.BytesIO()
    torch.save([1], buffer)
    payload = buffer.getvalue()
    path.write_bytes(content[: len(checkpoints.MAGIC)] + hashlib.sha256(payload).digest() + payload)


@pytest.mark.parametrize("spoil", [foreign_torch, foreign_text, flipped, not_a_dict])
def test_foreign_files(tmp_path: Path, spoil: Any) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"x": 1})
    store.save(2, {"x": 2})
    spoil(store.path(2))
    with pytest.raises(
        ValueError, match=r"step-000000002\.ckpt: (not a checkpoint|the checkpoint is cut off)"
    ):
        checkpoints.read(store.path(2))
    with pytest.warns(UserWarning, match="checkpoint 1 before it is used"):
        assert store.latest() == (1, {"x": 1})


def test_only_the_last_ones_are_kept_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    store, other = Checkpoints(tmp_path, keep=3), Checkpoints(tmp_path, rank=1)
    for number in range(1, 7):
        store.save(number, {"n": number})
    other.save(4, {"n": 40})
    assert store.numbers() == [4, 5, 6]
    assert other.latest() == (4, {"n": 40})
    assert store.latest(at_most=5) == (5, {"n": 5})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="there is a file"):
        Checkpoints(tmp_path / "notes.txt")


def test_random_states() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    np.random.randn()  # leaves half a pair behind
    state = checkpoints.random_state()
    first = draw()
    assert draw() != first
    checkpoints.set_random_state(state)
    assert draw() == first


def pruner(folder: Path, **options: Any) -> Pruner:
    given = {"total": 4, "example_inputs": nets.X, "checkpoint_dir": folder, **options}
    return Pruner(nets.mlp(), "gmp", 0.5, **given)


def test_refusals(tmp_path: Path) -> None:
    first = pruner(tmp_path, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="call resume"):
        first.step(1)
    with pytest.raises(TypeError, match="order=7"):
        first.resume(order=7)
    assert first.resume(order=torch.Generator()) == 0
    first.step(1)
    assert not list(tmp_path.iterdir())
    first.step(2)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"of another run, with total=4, not 5"):
        pruner(tmp_path, total=5).resume(order=torch.Generator())
    again = pruner(tmp_path)
    with pytest.raises(ValueError, match=r"attached are \['optimizer'\]"):
        again.resume(optimizer=torch.optim.SGD(again.model.parameters(), lr=1))
    Checkpoints(tmp_path).save(9, {"x": 1})
    with pytest.raises(ValueError, match="not of a training run"):
        pruner(tmp_path).resume(order=torch.Generator())
    with pytest.raises(TypeError, match=r"state\['x'\]\[0\] is a object"):
        checkpoints.write(tmp_path / "x", {"x": [object()]})
    with pytest.raises(FileNotFoundError):
        checkpoints.read(tmp_path / "missing")
