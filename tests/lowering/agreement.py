"""Is the lowered graph right? Everything that it says is compared with the oracle, which never saw it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from oracle import effective_parameters, log_paths, path_gradients
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.graph import ChannelGraph
from fxprune.lowering import lower
from fxprune.paths.count import flow, reach

Masks = Mapping[str, Tensor]


def lowered(model: nn.Module, inputs: Any) -> ChannelGraph:
    """The graph of a model, every op of it known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Python number of the batch size")
        graph = lower(capture(model.eval(), inputs), strict=True)
    assert [op.reason for op in graph.opaque] == []
    return graph


def without_dead_taps(graph: ChannelGraph) -> ChannelGraph:
    """The graph for periodic images, on which no tap sees padding."""
    ops = tuple(
        dataclasses.replace(op, live_taps=None) if getattr(op, "live_taps", None) is not None else op
        for op in graph.ops
    )
    return dataclasses.replace(graph, ops=ops, programs={})


def assert_same_masks(got: Masks, want: Masks, what: str) -> None:
    assert set(got) == set(want), what
    for name in got:
        wrong = (got[name] != want[name]).nonzero().tolist()
        assert wrong == [], f"{what}: {name} at {wrong[:5]}, {len(wrong)} of {got[name].numel()}"


def _whole(graph: ChannelGraph) -> dict[str, Tensor]:
    """Masks that keep everything, so that the oracle knows which parameters are meant."""
    return {name: torch.ones(kernels.shape, dtype=torch.bool) for name, kernels in graph.kernels.items()}


def assert_reach(
    graph: ChannelGraph, model: nn.Module, inputs: Any, masks: Masks, *, periodic: bool = True
) -> None:
    """Effective weights: spatial as the oracle, channel a superset and as the oracle on periodic images."""
    masks = _whole(graph) | dict(masks)
    spatial = reach(graph, masks)
    assert_same_masks(spatial, effective_parameters(model, inputs, masks), "spatial")
    channel = reach(graph, masks, resolution="channel")
    missing = [name for name in spatial if bool((spatial[name] & ~channel[name]).any())]
    assert missing == [], "channel is not a superset"
    if periodic:
        want = effective_parameters(model, inputs, masks, padding="circular")
        got = reach(without_dead_taps(graph), masks, resolution="channel")
        assert_same_masks(got, want, "periodic")


def assert_flow(
    graph: ChannelGraph, model: nn.Module, inputs: Any, masks: Masks, *, derivatives: bool = True
) -> None:
    """ln R and its derivatives, to nine digits."""
    masks = _whole(graph) | dict(masks)
    result = flow(graph, masks, dtype=torch.float64)
    want = log_paths(model, inputs, masks) - math.log(graph.samples)
    if want == -math.inf:
        assert result.log_total == -math.inf
        assert not any(bool(gradient.any()) for gradient in result.gradients.values())
        return
    assert abs(result.log_total - want) <= 1e-9 * max(1.0, abs(want)), (result.log_total, want)
    if derivatives:
        expected = path_gradients(model, inputs, masks)
        for name, gradient in result.gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
