"""All that must hold for any network: fidelity, the oracle's answers, exact counts, masks that come back."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from capture.faithful import assert_close
from oracle import count_paths, effective_parameters, log_paths, prunable, random_masks
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import flow, reach
from fxprune.rewrite import direct_reads, install, read
from lowering.agreement import assert_same_masks, without_dead_taps


def assert_whole(model: nn.Module, example: Tensor, density: float, seed: int) -> None:
    """Every promise, on one network under one set of random masks."""
    gm = capture(model, example)
    _assert_faithful(gm, model, example)
    graph = lower(gm, strict=True)
    assert [op.reason for op in graph.opaque] == []
    assert set(graph.kernels) >= set(prunable(model))
    masks = random_masks(model, density, seed)
    spatial = reach(graph, masks)
    assert_same_masks(spatial, effective_parameters(model, example, masks, dtype=torch.float32), "spatial")
    channel = reach(graph, masks, resolution="channel")
    missing = [name for name in spatial if bool((spatial[name] & ~channel[name]).any())]
    assert missing == [], "channel is not a superset"
    want = effective_parameters(model, example, masks, padding="circular", dtype=torch.float32)
    assert_same_masks(reach(without_dead_taps(graph), masks, resolution="channel"), want, "periodic")
    _assert_counted(graph, model, example, masks)
    _assert_masked(gm, model, example, masks, spatial)


def _assert_faithful(gm: nn.Module, model: nn.Module, example: Tensor) -> None:
    x = torch.randn(1, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(gm(x), model(x), "eval at batch 1")
    x = torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(4))
    results = []
    for network in (copy.deepcopy(model).train(), copy.deepcopy(gm).train()):
        torch.manual_seed(0)
        output = network(x)
        output.square().mean().backward()
        results.append((output, [p.grad for p in network.parameters()], list(network.buffers())))
    for part in range(3):
        a, b = ([t for t in _list(result[part]) if t is not None] for result in results)
        assert_close(b[: len(a)], a, f"train, part {part}")


def _list(x: Any) -> list[Any]:
    return [x] if isinstance(x, Tensor) else list(x)


def _assert_counted(graph: Any, model: nn.Module, example: Tensor, masks: dict[str, Tensor]) -> None:
    try:
        paths = count_paths(model, example, masks)
    except OverflowError:
        want = log_paths(model, example, masks)
    else:
        assert paths % graph.samples == 0
        want = math.log(paths) if paths else -math.inf
    got = flow(graph, masks, dtype=torch.float64)
    assert got.log_total == want or abs(got.log_total - want + math.log(graph.samples)) < 1e-11
    assert all(bool(torch.isfinite(gradient).all()) for gradient in got.gradients.values())


def _assert_masked(
    gm: Any, model: nn.Module, example: Tensor, masks: dict[str, Tensor], spatial: dict[str, Tensor]
) -> None:
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in prunable(zeroed).items():
            weight.mul_(masks[name])
        expected = zeroed(example)
    plain = copy.deepcopy(model)
    install(plain, masks, direct=direct_reads(gm))
    install(gm, masks)
    for network in (plain, gm):
        found = read(network)
        for name, mask in masks.items():
            assert torch.equal(found[name], mask), name
        with torch.no_grad():
            assert_close(network(example), expected, "masked")
    assert_same_masks(reach(lower(gm, strict=True), masks), spatial, "lowered with its masks")
