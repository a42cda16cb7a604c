"""Attention of torch.nn and by hand loses whole heads, and channels within heads, with equal outputs."""

from typing import Any

import pytest
import torch
from thinning import one_in
from torch import Tensor, nn

import fxprune


class Attending(nn.Module):
    """One call of `nn.MultiheadAttention` between two linear layers."""

    def __init__(self, call: dict[str, Any], *, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.other = nn.Linear(5, options.get("kdim") or 8)
        self.inner = nn.MultiheadAttention(8, 2, **options)
        self.call, self.cross = call, cross

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        other = self.other(y) if self.cross else x
        mixed, weights = self.inner(x, other, other, **self.call)
        out: Tensor = self.last(mixed)
        return out if weights is None else out * (1 + weights.mean())


FALSE = {"need_weights": False}
BLOCKED = torch.ones(4, 4, dtype=torch.bool).triu(1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (FALSE, {"batch_first": True}),
    "length first": (FALSE, {}),
    "no biases": (FALSE, {"batch_first": True, "bias": False}),
    "weights averaged": ({}, {"batch_first": True}),
    "weights by head": ({"average_attn_weights": False}, {"batch_first": True}),
    "dropout": (FALSE, {"batch_first": True, "dropout": 0.3}),
    "blocked": ({"need_weights": False, "attn_mask": BLOCKED}, {"batch_first": True}),
    "blocked by hand": ({"attn_mask": BLOCKED}, {"batch_first": True}),
    "added": (
        {"need_weights": False, "attn_mask": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))},
        {"batch_first": True},
    ),
    "cross": (FALSE, {"batch_first": True, "cross": True}),
    "cross without biases": (FALSE, {"cross": True, "bias": False}),
    "own widths": (FALSE, {"batch_first": True, "cross": True, "kdim": 7, "vdim": 7}),
}


def drawn(case: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    call, options = CASES[case]
    model = Attending(call, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.2, 1.0) if parameter.dim() == 1 else parameter.normal_()
    return model, (torch.randn(4, 4, 6), torch.randn(4, 4, 5))


def assert_same(left: Tensor, right: Tensor) -> None:
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-5 * float(left.detach().abs().max()))


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("case", "granularity"), one_in(2, sorted(CASES), ["channel", "head"]))
def test_torch_attention_loses_heads_and_channels_within_heads(case: str, granularity: str) -> None:
    model, inputs = drawn(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = fxprune.apply(
        model, "magnitude", 0.4, granularity=granularity, example_inputs=inputs, progress=False
    ).eval()
    small = fxprune.compact(pruned, inputs)
    table = small.meta["fxprune"]["compaction"]
    assert table.given_back == 0
    assert_same(pruned(*inputs), small(*inputs))
    for name, mask in fxprune.masks(pruned).items():
        assert small.get_parameter(name).numel() == int(mask.sum()), name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    other = tuple(
        torch.cat([x, -x]).transpose(0, 1) if not model.inner.batch_first else torch.cat([x, -x])
        for x in inputs
    )
    if "added" not in case and model.inner.batch_first:  # other batch sizes
        assert_same(pruned(*other), small(*other))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_the_table_counts_products_of_two_values(granularity: str) -> None:
    model, inputs = drawn("plain")
    pruned = fxprune.apply(
        model, "magnitude", 0.6, granularity=granularity, example_inputs=inputs, progress=False
    )
    small = fxprune.compact(pruned, inputs)
    table = small.meta["fxprune"]["compaction"]
    # Scores and mixtures: 4 x 4 positions, times the channels of all heads.
    width = [len(net.get_parameter("inner.in_proj_bias")) for net in (model, small)]
    mixed = [net.get_parameter("inner.out_proj.weight").shape[1] for net in (model, small)]
    scored = [(whole - part) // 2 for whole, part in zip(width, mixed, strict=True)]
    assert table.products == tuple(16 * (a + b) for a, b in zip(scored, mixed, strict=True))
    assert table.products[1] < table.products[0]
    layers = sum(layer.macs[1] for layer in table.layers)
    assert table.macs[1] == layers + table.products[1]
    assert "products of two values" in str(table)


@pytest.mark.slow
def test_an_opened_attention_is_pruned_again_and_trains() -> None:
    model, inputs = drawn("plain")
    options: dict[str, Any] = {"granularity": "channel", "progress": False}
    small = fxprune.compact(fxprune.apply(model, "magnitude", 0.3, example_inputs=inputs, **options))
    again = fxprune.apply(small, "magnitude", 0.3, **options)
    smaller = fxprune.compact(again)
    assert_same(again.eval()(*inputs), smaller.eval()(*inputs))
    masked = fxprune.apply(small, "magnitude", 0.5, progress=False).train()
    optimizer = torch.optim.SGD(masked.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        masked(*inputs).square().mean().backward()
        optimizer.step()
    fxprune.verify(masked)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_are_opened(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 6)
    pruned = fxprune.apply(model, "magnitude", 0.4, granularity="channel", example_inputs=x, progress=False)
    small = fxprune.compact(pruned)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert small.get_parameter("1.linear1.weight").shape[0] < 12
    assert_same(pruned.eval()(x), small(x))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("norm_first", [False, True])
def test_channels_around_encoder_layers_go_alone(norm_first: bool) -> None:
    """Nothing but the norms inside reads them as a whole."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 6)
    pruned = fxprune.apply(
        model, "magnitude", 0.25, granularity="channel", of="memory", example_inputs=x, progress=False
    )
    assert int(fxprune.masks(pruned)["0.weight"].any(1).sum()) == 6
    small = fxprune.compact(pruned)
    assert small.get_parameter("0.weight").shape == (6, 6)
    assert small.get_parameter("1.norm1.weight").shape == (6,)
    assert_same(pruned.eval()(x), small(x))


def test_attention_with_padded_keys_stays_whole_and_says_so() -> None:
    torch.manual_seed(0)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = (
                nn.MultiheadAttention(8, 2, batch_first=True, add_zero_attn=True),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.inner(x, x, x, need_weights=False)[0])
            return out

    model, x = Padded().eval(), torch.randn(2, 4, 8)
    with torch.no_grad():
        model.inner.in_proj_weight[16] = 0
        model.inner.out_proj.weight[:, 0] = 0
    small = fxprune.compact(model, x)
    assert_same(model(x), small(x))
    assert small.get_parameter("inner.in_proj_weight").shape == (24, 8)


class Packed(nn.Module):
    """Queries, keys and values of one projection, whose weights for queries and keys are small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.out, self.last = (
            nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT).softmax(-1) @ v
        out: Tensor = self.last(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return out


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_queries_and_keys_of_one_projection_do_not_go_altogether(share: float) -> None:
    torch.manual_seed(0)
    net, x = Packed().eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        net.qkv.weight[:16] *= 1e-3
    pruned = fxprune.apply(
        net, "magnitude", share, granularity="channel", of="macs", example_inputs=x, progress=False
    ).eval()
    kept = fxprune.masks(pruned)["qkv.weight"].any(1).view(3, -1).sum(1)
    assert bool((kept > 0).all())
    small = fxprune.compact(pruned, x)
    assert small.meta["fxprune"]["compaction"].given_back == 0
    assert_same(small(x), pruned(x))


def test_dead_queries_and_keys_of_one_projection_keep_as_many_channels_as_values() -> None:
    torch.manual_seed(0)
    net, x = Packed().eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        for rows in (slice(16), [17, 18, 21, 22]):
            net.qkv.weight[rows], net.qkv.bias[rows] = 0.0, 0.0
    small = fxprune.compact(net, x)
    assert_same(small(x), net(x))
    assert small.get_parameter("qkv.weight").shape[0] == 12
