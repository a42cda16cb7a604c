"""Iterative magnitude pruning with rewinding, as a loop around the user's training."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from training import nets

SIZE = 6 * 16 + 16 * 12 + 12 * 3


def test_train_prune_rewind() -> None:
    starts: list[tuple[int, int]] = []
    seen: list[dict[str, torch.Tensor]] = []
    at_step_2: dict[str, torch.Tensor] = {}

    def values(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    def train(model: nn.Module, run: Any) -> int:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        start = run.attach(optimizer=optimizer)
        starts.append((run.round, start))
        seen.append(values(model))
        for step in range(start + 1, 7):
            nets.train_step(model, optimizer, step)
            run.step(step)
            if run.round == 0 and step == 2:
                at_step_2.update(values(model))
        return 100 + run.round

    found = fxprune.lottery(nets.mlp, train, 3, 0.2, rewind_to=2, example_inputs=nets.X, progress=False)
    assert starts == [(0, 0), (1, 2), (2, 2), (3, 2)]
    assert found.results == [100, 101, 102, 103]
    kept = [round(SIZE * (1 - sparsity)) for sparsity in found.sparsities]
    assert kept == [round(SIZE * 0.8**level) for level in range(4)]
    for earlier, later in pairwise(seen[1:]):
        assert all(bool(((earlier[n] != 0) | (later[n] == 0)).all()) for n in found.masks), (
            "masks only shrink"
        )
    for name, value in at_step_2.items():
        for start_values in seen[1:]:
            left = start_values[name]
            assert torch.equal(left, value * (left != 0)), "survivors are where they were at step 2"
            if name not in found.masks:
                assert torch.equal(left, value)
    for name, mask in found.masks.items():
        assert torch.equal(seen[3][name] != 0, mask)
    fxprune.verify(found.model)


def test_the_ticket_of_step_0_needs_no_steps() -> None:
    starts = []

    def train(model: nn.Module) -> None:
        starts.append({name: value.detach().clone() for name, value in model.named_parameters()})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for step in range(3):
            nets.train_step(model, optimizer, step)

    found = fxprune.lottery(nets.mlp, train, 1, 0.5, example_inputs=nets.X, budget="uniform", exclude="4")
    for name, value in nets.mlp().named_parameters():
        assert torch.equal(starts[1][name], value * found.masks.get(name, torch.tensor(True)))
    assert {float(mask.float().mean()) for mask in found.masks.values()} == {0.5}
    assert found.results == [None, None]


def test_refusals() -> None:
    def fine(model: nn.Module, run: Any) -> None:
        run.step(1)

    def lottery(train: Any = fine, **change: Any) -> None:
        fxprune.lottery(nets.mlp, train, **{"rounds": 1, "example_inputs": nets.X, **change})

    with pytest.raises(ValueError, match="rounds=0"):
        lottery(rounds=0)
    with pytest.raises(ValueError, match=r"rate=20.*0\.2"):
        lottery(rate=20)
    with pytest.raises(ValueError, match="rewind_to=-1"):
        lottery(rewind_to=-1)
    with pytest.raises(ValueError, match=r"never called run\.step\(4\); it came to step 1"):
        lottery(rewind_to=4)
    with pytest.raises(ValueError, match=r"train_fn must take \(model, run\)"):
        lottery(lambda model: None, rewind_to=4)
    with pytest.raises(TypeError, match="train_fn=3"):
        lottery(3)
    with pytest.raises(TypeError, match=r"expected a function of \(model, run\)"):
        lottery(lambda: None)
    with pytest.raises(ValueError, match="at=1: step 1 of this round is done"):
        lottery(lambda model, run: [run.step(1), run.step(1)])


def test_results_that_cannot_be_kept(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['results'\]\[0\] is a object"):
        fxprune.lottery(
            nets.mlp,
            lambda model: object(),
            1,
            example_inputs=nets.X,
            checkpoint_dir=tmp_path,
            progress=False,
        )
