"""Options that every method takes: weights drawn anew, small batches; models wrapped for data parallelism."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxprune


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4


@pytest.mark.parametrize("returns", ["graph", "module"])
def test_reinit_keeps_the_masks_and_forgets_the_weights(returns: str) -> None:
    plain = fxprune.apply(network(), "magnitude", 0.5, example_inputs=X, returns=returns)
    anew = fxprune.apply(network(), "magnitude", 0.5, example_inputs=X, returns=returns, reinit=True)
    first, second = fxprune.masks(plain), fxprune.masks(anew)
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = plain.get_parameter("0.weight"), anew.get_parameter("0.weight")
    assert not torch.equal(one, two)
    assert (two[~second["0.weight"]] == 0).all()
    fxprune.verify(anew)


def test_small_batches_give_the_same_masks() -> None:
    whole = fxprune.masks(fxprune.apply(network(), "snip", 0.5, example_inputs=X, data=(X, Y)))
    parts = fxprune.masks(fxprune.apply(network(), "snip", 0.5, example_inputs=X, data=(X, Y), micro_batch=5))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_wrong_values_are_named() -> None:
    with pytest.raises(TypeError, match="reinit='yes'"):
        fxprune.apply(network(), "random", 0.5, example_inputs=X, reinit="yes")
    with pytest.raises(ValueError, match="micro_batch=0"):
        fxprune.apply(network(), "snip", 0.5, example_inputs=X, data=(X, Y), micro_batch=0)


def test_a_model_wrapped_for_data_parallel_training_is_taken_out(tmp_path: Path) -> None:
    model = network()
    expected = fxprune.masks(fxprune.apply(copy.deepcopy(model), "magnitude", 0.5, example_inputs=X))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        found = fxprune.masks(
            fxprune.apply(DistributedDataParallel(model), "magnitude", 0.5, example_inputs=X)
        )
    finally:
        dist.destroy_process_group()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
