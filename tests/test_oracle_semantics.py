"""Paths in the oracle: gates, norms, attention, constants; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from net_blocks import Excite, SelfAttention
from nets import NETS
from oracle import (
    UnknownOpError,
    effective_parameters,
    log_paths,
    random_masks,
)
from torch import Tensor, nn
from torch.nn import functional as F


def bools(rows: list[Any]) -> Tensor:
    """A mask from nested lists of 0 and 1."""
    return torch.tensor(rows, dtype=torch.bool)


def chain(*sizes: int, bias: bool = False) -> nn.Sequential:
    """A linear network; the weights are named 0.weight, 1.weight, ..."""
    return nn.Sequential(*[nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes)])


# ---------------------------------------------------------------- gates


def test_dead_gate_passes_the_signal() -> None:
    """sigmoid(0) is not 0: with a dead excitation the trunk lives and the squeeze is ineffective."""
    model, x = Excite(torch.sigmoid), torch.randn(1, 3, 4, 4)
    found = effective_parameters(model, x, {"expand.weight": torch.zeros(8, 4, 1, 1, dtype=torch.bool)})
    assert bool(found["first.weight"].all())
    assert bool(found["last.weight"].all())
    assert not found["reduce.weight"].any()


def test_dead_signal_blocks_its_gate() -> None:
    """x * g with x Zero is Zero: the gate of a dead channel is ineffective, others are not."""
    model, x = Excite(torch.sigmoid), torch.randn(1, 3, 4, 4)
    first = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    first[2] = False
    found = effective_parameters(model, x, {"first.weight": first})
    rows = found["expand.weight"].flatten(1).all(1)
    assert rows.tolist() == [channel != 2 for channel in range(8)]
    assert not found["last.weight"][:, 2].any()  # a dead signal reaches nothing: 0 * g = 0


class Product(nn.Module):
    """left(x) * right(x), summed by a last layer."""

    def __init__(self, left_bias: bool, right_bias: bool) -> None:
        super().__init__()
        self.left = nn.Linear(2, 2, bias=left_bias)
        self.right = nn.Linear(2, 2, bias=right_bias)
        self.last = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.left(x) * self.right(x))


@pytest.mark.parametrize("left_bias", [False, True])
@pytest.mark.parametrize("right_bias", [False, True])
def test_product_of_live_values(left_bias: bool, right_bias: bool) -> None:
    """Each factor passes only where the other is not Zero, and a bias is enough for that."""
    masks = {"left.weight": bools([[1, 1], [0, 0]]), "right.weight": bools([[0, 0], [1, 1]])}
    found = effective_parameters(Product(left_bias, right_bias), torch.ones(1, 2), masks)
    assert found["left.weight"].any(1).tolist() == [right_bias, False]
    assert found["right.weight"].any(1).tolist() == [False, left_bias]
    assert found["last.weight"].tolist() == [[right_bias, left_bias]]


def test_bias_counts_by_existence() -> None:
    """A bias of zeros opens a product as any other does."""
    model = Product(left_bias=False, right_bias=True)
    assert model.right.bias is not None
    nn.init.zeros_(model.right.bias)
    found = effective_parameters(
        model, torch.ones(1, 2), {"right.weight": torch.zeros(2, 2, dtype=torch.bool)}
    )
    assert bool(found["left.weight"].all())


def test_norms_are_their_affine_part() -> None:
    """Statistics mix nothing; a norm's bias is a bias."""
    x, weight = torch.ones(1, 2), bools([[1, 1], [0, 0]])
    for affine in (True, False):
        left = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2, elementwise_affine=affine))
        model = Product(left_bias=False, right_bias=False)
        model.left = left  # type: ignore[assignment]
        found = effective_parameters(model, x, {"left.0.weight": weight})
        assert found["right.weight"].any(1).tolist() == [True, affine]


class HandMade(nn.Module):
    """A norm written out: each spelling is the identity on paths."""

    def __init__(self, spelling: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.spelling = nn.Linear(3, 3, False), nn.Linear(3, 3, False), spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.spelling(self.first(x)))


def _var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5)


def _moments(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def _root_mean_square(x: Tensor) -> Tensor:
    return x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt()


def _normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _by_norm(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)


@pytest.mark.parametrize("spelling", [_var_mean, _moments, _root_mean_square, _normalize, _by_norm])
def test_hand_written_norms_do_not_mix(spelling: Callable[[Tensor], Tensor]) -> None:
    """One live channel stays one live channel."""
    first = torch.zeros(3, 3, dtype=torch.bool)
    first[1] = True
    found = effective_parameters(HandMade(spelling), torch.ones(1, 3), {"first.weight": first})
    assert found["last.weight"].any(0).tolist() == [False, True, False]
    assert torch.equal(found["first.weight"], first)


# ---------------------------------------------------------------- attention


def heads(q: str, k: str, v: str) -> Tensor:
    """A qkv mask of width 8 with two heads; each letter of a string is a head: 1 dense, 0 dead."""
    rows = [torch.full((4, 8), letter == "1") for part in (q, k, v) for letter in part]
    return torch.cat(rows)


def alive(mask: Tensor) -> list[str]:
    """The inverse of `heads`."""
    letters = ["1" if bool(block.any()) else "0" for block in mask.split(4)]
    return ["".join(letters[start : start + 2]) for start in (0, 2, 4)]


@pytest.mark.parametrize("spelling", ["matmul", "sdpa", "einsum"])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (("11", "11", "11"), ["11", "11", "11"]),
        (("11", "01", "11"), ["01", "01", "11"]),  # dead keys: uniform attention, values still flow
        (("10", "11", "11"), ["10", "10", "11"]),  # dead queries likewise
        (("11", "11", "01"), ["01", "01", "01"]),  # no values: the scores have nothing to weigh
        (("00", "00", "11"), ["00", "00", "11"]),
    ],
)
def test_attention_heads(
    spelling: str, functional: bool, kept: tuple[str, str, str], expected: list[str]
) -> None:
    """Scores gate values, head by head; queries and keys live where the other is not Zero."""
    model = SelfAttention(spelling, functional=functional)
    found = effective_parameters(model, torch.ones(1, 5, 8), {"qkv.weight": heads(*kept)})
    assert alive(found["qkv.weight"]) == expected


def test_biased_keys_keep_queries() -> None:
    """With a bias the keys are constants, not Zero: queries stay effective, dead keys do not."""
    model = SelfAttention("sdpa", bias=True)
    found = effective_parameters(model, torch.ones(1, 5, 8), {"qkv.weight": heads("11", "00", "11")})
    assert alive(found["qkv.weight"]) == ["11", "00", "11"]


def test_query_and_key_channels_meet_one_to_one() -> None:
    """q . k is a sum of products: a channel of q needs the same channel of k."""
    mask = torch.ones(24, 8, dtype=torch.bool)
    mask[0], mask[8 + 1] = False, False  # channel 0 of q, channel 1 of k, both in head 0
    found = effective_parameters(SelfAttention("matmul"), torch.ones(1, 5, 8), {"qkv.weight": mask})
    assert found["qkv.weight"].any(1)[:4].tolist() == [False, False, True, True]
    assert found["qkv.weight"].any(1)[8:12].tolist() == [False, False, True, True]


def test_dead_value_channel_is_not_revived() -> None:
    """A dead value channel is Zero whatever the scores are."""
    mask = torch.ones(24, 8, dtype=torch.bool)
    mask[16 + 3] = False
    found = effective_parameters(SelfAttention("matmul"), torch.ones(1, 5, 8), {"qkv.weight": mask})
    assert found["proj.weight"].any(0).tolist() == [channel != 3 for channel in range(8)]


@pytest.mark.parametrize("density", [0.7, 0.3, 0.1])
def test_multihead_module_is_attention_by_hand(density: float) -> None:
    """`nn.MultiheadAttention` agrees with the same attention written out."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x, x, x)[0]

    hand, x = SelfAttention("matmul"), torch.ones(2, 5, 8)
    masks = random_masks(hand, density, 0)
    renamed = {"inner.in_proj_weight": masks["qkv.weight"], "inner.out_proj.weight": masks["proj.weight"]}
    expected, found = effective_parameters(hand, x, masks), effective_parameters(Wrapped(), x, renamed)
    assert torch.equal(found["inner.in_proj_weight"], expected["qkv.weight"])
    assert torch.equal(found["inner.out_proj.weight"], expected["proj.weight"])
    assert log_paths(Wrapped(), x, renamed) == pytest.approx(log_paths(hand, x, masks))


def test_class_token_is_a_constant() -> None:
    """Queries of a class token that has seen nothing yet carry no path; its keys and values do elsewhere."""
    torch.manual_seed(0)
    model, x = NETS["vit"]()
    found = effective_parameters(model, x, {})
    letters = alive(found["attention.qkv.weight"])
    assert letters == ["00", "11", "11"]
    assert all(bool(mask.all()) for name, mask in found.items() if name != "attention.qkv.weight")


def test_masked_pairs_carry_nothing() -> None:
    """Values of a pair that -inf or False forbids do not flow; a finite number forbids nothing."""

    class Causal(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.mask = mask
            self.mix = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mix(x.transpose(1, 2)).transpose(1, 2)  # positions become visible as weights
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)[:, :1]

    x = torch.ones(1, 3, 2)
    lower = torch.ones(3, 3, dtype=torch.bool).tril()
    for mask, rows in [
        (lower, [True, False, False]),
        (torch.zeros(3, 3).masked_fill(~lower, -torch.inf), [True, False, False]),
        (torch.zeros(3, 3).masked_fill(~lower, -100.0), [True, True, True]),
    ]:
        found = effective_parameters(Causal(mask), x, {})
        assert found["mix.weight"].any(1).tolist() == rows


# ---------------------------------------------------------------- what it refuses


class Applied(nn.Module):
    """A linear layer and a given function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def _stale(x: Tensor) -> Tensor:
    view = x[:, :2]
    view.add_(1.0)
    return x


def _written_back(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :2] += 1.0
    return x


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x.argsort(dim=-1) * x, "argsort"),
        (lambda x: torch.special.bessel_j0(x), "bessel_j0"),
        (lambda x: x if x.sum() > 0 else -x, "gt"),
        (_stale, "in place through a view"),
    ],
)
def test_unknown_operations_are_named(function: Callable[[Tensor], Any], word: str) -> None:
    """Nothing passes in silence."""
    with pytest.raises(UnknownOpError, match=word):
        effective_parameters(Applied(function), torch.ones(1, 4), {})


def test_in_place_slices() -> None:
    """x[i] += y writes its view back, and is read correctly afterwards."""
    found = effective_parameters(Applied(_written_back), torch.ones(1, 4), {})
    assert bool(found["weight" if "weight" in found else "linear.weight"].all())


def test_bad_arguments() -> None:
    """Unknown names and paddings are errors."""
    with pytest.raises(ValueError, match="named 'x'"):
        effective_parameters(chain(2, 2), torch.ones(1, 2), {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="circular"):
        effective_parameters(chain(2, 2), torch.ones(1, 2), {}, padding="zeros")


def test_the_model_is_untouched() -> None:
    """Weights, mode and gradients stay as they were."""
    torch.manual_seed(0)
    model, x = NETS["norms"]()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    effective_parameters(model, x, random_masks(model, 0.5, 0))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_buffer_replaced_in_the_forward() -> None:
    """A cache that replaces a buffer must not lend its identity to another tensor."""

    class Caching(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, bias=False)
            self.register_buffer("table", torch.zeros(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                self.table = torch.arange(4.0)
                x = x + torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(2, 2).flatten()
            return self.linear(x) * self.table

    found = effective_parameters(Caching(), torch.ones(1, 4), {})
    assert bool(found["linear.weight"].all())


def test_constants_made_in_the_forward() -> None:
    """Elementwise they count by existence; zeros throughout are Zero; in a contraction they select."""

    def scale(x: Tensor) -> Tensor:
        return x * torch.arange(4.0)

    def erase(x: Tensor) -> Tensor:
        return x * torch.zeros(4)

    def select(x: Tensor) -> Tensor:
        return x @ torch.eye(4, dtype=torch.int)[:, :1].to(x)

    for function, rows in [(scale, [True] * 4), (erase, [False] * 4), (select, [True, False, False, False])]:
        found = effective_parameters(Applied(function), torch.ones(1, 4), {})
        assert found["linear.weight"].any(1).tolist() == rows


def test_masks_computed_from_fresh_constants() -> None:
    """`x.new_zeros` may be filled with numbers and compared, or filled with live values."""

    def compared(x: Tensor) -> Tensor:
        regions = x.new_zeros(4)
        regions[2:] = 1
        return x.masked_fill((regions - regions[:1]) != 0, 0.0)

    def filled(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, 2:] = x[:, :2]
        return out

    for function in (compared, filled):
        found = effective_parameters(Applied(function), torch.ones(1, 4), {})
        assert found["linear.weight"].any(1).tolist() == [True, True, False, False]
