"""Products on paths: with shares, no factor starves while the other lives."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import flow


class Attention(nn.Module):
    """One head, and nothing beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.out = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x) * torch.sigmoid(self.gate(x)))


def shares(model: nn.Module, example: Tensor, pruned: tuple[str, ...] = ()) -> dict[str, float]:
    """The part of the flow that each layer carries."""
    torch.manual_seed(0)
    sizes = {
        name: p.detach().abs() * (name.removesuffix(".weight") not in pruned)
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    graph = lower(capture(model, example))
    found = flow(graph, sizes, products="mean", dtype=torch.float64).gradients
    return {name.removesuffix(".weight"): float((found[name] * sizes[name]).sum()) for name in sizes}


def test_values_carry_half_and_queries_and_keys_a_quarter_each() -> None:
    found = shares(Attention(), torch.ones(2, 3, 6))
    assert found == pytest.approx({"q": 0.25, "k": 0.25, "v": 0.5, "out": 1.0})


def test_both_sides_of_a_gate_carry_half() -> None:
    assert shares(Gate(), torch.ones(2, 5)) == pytest.approx({"body": 0.5, "gate": 0.5, "out": 1.0})


def test_a_side_that_is_gone_leaves_all_to_the_other() -> None:
    found = shares(Gate(), torch.ones(2, 5), pruned=("gate",))
    assert found == pytest.approx({"body": 1.0, "gate": 0.0, "out": 1.0})


@pytest.mark.slow
def test_shares_stay_finite_over_hundreds_of_products() -> None:
    model = nn.Sequential(*[Attention() for _ in range(40)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-8
    found = shares(model, torch.ones(1, 3, 6))
    assert [found[f"{i}.v"] for i in range(40)] == pytest.approx([0.5] * 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize("method", ["synflow", "synflow-l2", "logsynflow", "npb-synflow"])
def test_a_pruned_vision_transformer_still_sees_its_input(method: str) -> None:
    """Counting paths through queries and keys alone leaves attention without values: a constant network."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=2, num_classes=10, embed_dim=32, depth=2, num_heads=2, class_token=True
    )
    pruned = fxprune.apply(
        model,
        method,
        0.9,
        example_inputs=torch.ones(1, 3, 8, 8),
        progress=False,
        on_collapse="warn",
        rounds=20,
    ).eval()
    for name, mask in fxprune.masks(pruned).items():
        if "qkv" in name:
            assert bool(mask[64:].any()), f"no values in {name}"
    with torch.no_grad():
        outputs = pruned(torch.randn(8, 3, 8, 8))
    assert float(outputs.std(0).mean()) > 1e-4
