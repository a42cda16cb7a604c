"""Norms, written in any way: channels that are listed as free go with equal outputs, the others are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.graph import ir
from fxprune.lowering.norm_statistics import counted_node, kind_of

WIDTH = 16
Form = Callable[["Normed", Tensor], Tensor]


class Normed(nn.Module):
    """A layer, a norm over what it gives, and a layer that reads that."""

    def __init__(self, form: Form, images: bool) -> None:
        super().__init__()
        self.form = form
        self.first: nn.Module = nn.Conv2d(3, WIDTH, 3, padding=1) if images else nn.Linear(6, WIDTH)
        self.last: nn.Module = nn.Conv2d(WIDTH, 4, 3) if images else nn.Linear(WIDTH, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.whole = nn.LayerNorm((WIDTH, 5, 5)) if images else nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.form(self, self.first(x)))
        return y


def length(x: Tensor, order: float) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(x, order, dim=-1, keepdim=True)
    return result


FREE: dict[str, tuple[Form, bool]] = {
    "vector_norm": (lambda m, h: h / length(h, 2.0), False),
    "vector_norm, l1": (lambda m, h: h / length(h, 1.0), False),
    "vector_norm, largest": (lambda m, h: h / length(h, float("inf")), False),
    "clipped length": (lambda m, h: h * (2.0 / (length(h, 2.0) + 1e-6)).clamp(max=1.0), False),
    "linalg.norm": (lambda m, h: h / torch.linalg.norm(h, dim=-1, keepdim=True), False),
    "torch.layer_norm": (lambda m, h: torch.layer_norm(h, (WIDTH,), m.scale, m.shift), False),
    "torch.rms_norm": (lambda m, h: torch.rms_norm(h, (WIDTH,), m.scale), False),
    "torch.group_norm": (lambda m, h: torch.group_norm(h, 4, m.scale, m.shift), True),
    "sum by the size": (
        lambda m, h: h * torch.rsqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + 1e-6),
        False,
    ),
    "sum by the number of entries": (
        lambda m, h: h * torch.rsqrt((h * h).sum(-1, keepdim=True) / (h.numel() / h.shape[0]) + 1e-6),
        False,
    ),
    "layer norm of images": (lambda m, h: m.whole(h), True),
    "layer norm of images, called": (
        lambda m, h: F.layer_norm(h, (WIDTH, 5, 5), m.whole.weight, m.whole.bias, 1e-3),
        True,
    ),
    "layer norm of images, without weights": (lambda m, h: F.layer_norm(h, (WIDTH, 5, 5)), True),
}
HELD: dict[str, tuple[Form, bool]] = {
    "of neighbours": (lambda m, h: F.local_response_norm(h, 5), True),
    "vector_norm, smallest": (lambda m, h: h / (1 + length(h, float("-inf"))), False),
    "vector_norm, negative": (lambda m, h: h / (1 + length(h, -1.0)), False),
    "normalize, negative": (lambda m, h: F.normalize(h, p=-1.0, dim=-1), False),
    "two axes of the last": (lambda m, h: F.rms_norm(h, (WIDTH, 5, 5)), True),
    "an equation": (lambda m, h: h * torch.rsqrt(torch.einsum("nc,nc->n", h, h)[:, None] + 1), False),
}


def made(form: Form, images: bool) -> tuple[Normed, Tensor]:
    torch.manual_seed(0)
    return Normed(form, images).eval(), torch.randn(3, 3, 5, 5) if images else torch.randn(3, 6)


@pytest.mark.every_case
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", FREE)
def test_what_is_free_goes(kind: str, verify: bool) -> None:
    net, x = made(*FREE[kind])
    pruned = fxprune.apply(net, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned, x, verify=verify)
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0, str(table)
    assert small.get_parameter("first.weight").shape[0] < WIDTH
    with torch.no_grad():
        torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


@pytest.mark.every_case
@pytest.mark.parametrize("kind", HELD)
def test_what_is_held_is_named(kind: str) -> None:
    net, x = made(*HELD[kind])
    groups = fxprune.channel_groups(net, x)
    assert not any(group.removable for group in groups)
    assert "a statistic over channels" in str(groups)
    with pytest.raises(ValueError, match="must stay"):
        fxprune.apply(net, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)


@pytest.mark.parametrize("exact", [True, False])
def test_a_layer_norm_of_images_gets_smaller_twice(exact: bool) -> None:
    net, x = made(*FREE["layer norm of images"])
    small: Any = net
    for seed in range(2):
        pruned = fxprune.apply(
            small, "random", 0.3, granularity="channel", example_inputs=x, progress=False, seed=seed
        )
        small = fxprune.compact(pruned, x, exact=exact)
    assert small.get_parameter("first.weight").shape[0] < 12
    assert small(x).shape == (3, 4, 3, 3)
    if exact:
        with torch.no_grad():
            torch.testing.assert_close(small(x), pruned(x), rtol=1e-5, atol=1e-5)


def test_the_graph_says_which_axes_are_held() -> None:
    net, x = made(*HELD["of neighbours"])
    norms = [op for op in fxprune.lower(fxprune.capture(net, x)).ops if isinstance(op, ir.Norm)]
    assert [op.held for op in norms] == [(1,)]
    net, x = made(*FREE["vector_norm"])
    norms = [op for op in fxprune.lower(fxprune.capture(net, x)).ops if isinstance(op, ir.Norm)]
    assert [op.held for op in norms] == [()]


def test_lengths_with_a_negative_order_count_zeros() -> None:
    for order, counts in ((2.0, False), (0, False), (float("inf"), False), (-1.0, True)):
        net, x = made(lambda m, h, order=order: h / (1 + length(h, order)), False)  # type: ignore[misc]
        gm = fxprune.capture(net, x)
        (node,) = [each for each in gm.graph.nodes if "vector_norm" in str(each.target)]
        assert (counted_node(node, 1) is None) is counts


def test_kinds_of_norms() -> None:
    kinds = {"torch.layer_norm": "layer", "torch.group_norm": "group", "layer norm of images": "whole"}
    for form, kind in kinds.items():
        net, x = made(*FREE[form])
        gm = fxprune.capture(net, x)
        assert kind in {kind_of(node) for node in gm.graph.nodes if node.op.startswith("call")}
