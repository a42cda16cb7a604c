"""The oracle on its own: hand-computed networks, removal of one weight at a time, and networks at large.

Hand-computed cases follow the toy networks of the literature sheet: A (pruned MLP), M (masks only), R
(residual), P (pooling), B (bias).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from nets import NETS
from oracle import (
    UnknownOpError,
    count_paths,
    effective_parameters,
    log_paths,
    path_gradients,
    prunable,
    random_masks,
)
from torch import Tensor, nn


def bools(rows: list[Any]) -> Tensor:
    """A mask from nested lists of 0 and 1."""
    return torch.tensor(rows, dtype=torch.bool)


def chain(*sizes: int, bias: bool = False) -> nn.Sequential:
    """A linear network; the weights are named 0.weight, 1.weight, ..."""
    return nn.Sequential(*[nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes)])


def run(model: nn.Module, inputs: Any) -> Tensor:
    """The sum of all outputs of the network itself."""
    outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    stack, result = [outputs], torch.zeros((), dtype=torch.float64)
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            result = result + item.sum()
        else:
            stack += item.values() if isinstance(item, dict) else item
    return result


def ones(inputs: Any) -> Any:
    """Inputs of ones, in double precision, batch 1; a tuple or a dict."""
    if isinstance(inputs, dict):
        return {name: torch.ones_like(leaf[:1], dtype=torch.float64) for name, leaf in inputs.items()}
    leaves = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(torch.ones_like(leaf[:1], dtype=torch.float64) for leaf in leaves)


# ---------------------------------------------------------------- hand-computed


def test_toy_a() -> None:
    """2-2-1: dense it has four paths; after two rounds of SynFlow one complete path is left."""
    model = chain(2, 2, 1)
    assert count_paths(model, torch.ones(1, 2), {}) == 4
    masks = {"0.weight": bools([[0, 0], [1, 0]]), "1.weight": bools([[0, 1]])}
    assert count_paths(model, torch.ones(1, 2), masks) == 1
    found = effective_parameters(model, torch.ones(1, 2), masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    masks = {"0.weight": bools([[0, 0], [1, 0]]), "1.weight": bools([[1, 0]])}
    assert log_paths(model, torch.ones(1, 2), masks) == float("-inf")
    assert not any(mask.any() for mask in effective_parameters(model, torch.ones(1, 2), masks).values())


def test_toy_m() -> None:
    """2-3-2-1 with given masks: three paths, six effective connections, known derivatives."""
    masks = {
        "0.weight": bools([[1, 1], [1, 0], [0, 0]]),
        "1.weight": bools([[1, 1, 1], [0, 0, 1]]),
        "2.weight": bools([[1, 1]]),
    }
    model, x = chain(2, 3, 2, 1), torch.ones(1, 2)
    assert count_paths(model, x, masks) == 3
    third = 1 / 3
    expected = {
        "0.weight": [[third, third], [third, third], [2 * third, 2 * third]],
        "1.weight": [[2 * third, third, 0], [2 * third, third, 0]],
        "2.weight": [[1, 0]],
    }
    for name, gradient in path_gradients(model, x, masks).items():
        torch.testing.assert_close(gradient, torch.tensor(expected[name], dtype=torch.float64))
    found = effective_parameters(model, x, masks)
    assert [int(mask.sum()) for mask in found.values()] == [3, 2, 1]
    assert torch.equal(found["1.weight"], bools([[1, 1, 0], [0, 0, 0]]))


class ToyR(nn.Module):
    """h = F1 x; y = F3 F2 h + h; out = F4 y."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2, self.f3 = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.f4 = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f1(x)
        return self.f4(self.f3(self.f2(x)) + x)


def test_toy_r() -> None:
    """The skip is counted at the scale of the branch: 20 paths, not 32; 8, not 20."""
    x = torch.ones(1, 2)
    assert count_paths(ToyR(), x, {}) == 20
    masks = {"f2.weight": bools([[1, 1], [1, 0]]), "f3.weight": bools([[0, 1], [0, 1]])}
    assert count_paths(ToyR(), x, masks) == 8
    expected = {
        "f1.weight": [[0.375, 0.375], [0.125, 0.125]],
        "f2.weight": [[0.0, 0.0], [0.5, 0.5]],
        "f3.weight": [[0.5, 0.25], [0.5, 0.25]],
        "f4.weight": [[0.5, 0.5]],
    }
    for name, gradient in path_gradients(ToyR(), x, masks).items():
        torch.testing.assert_close(gradient, torch.tensor(expected[name], dtype=torch.float64))
    found = effective_parameters(ToyR(), x, masks)
    assert sum(int(mask.sum()) for mask in found.values()) == 9
    assert torch.equal(found["f2.weight"], bools([[0, 0], [1, 0]]))


@pytest.mark.parametrize(
    ("pool", "paths"), [(nn.Identity(), 100), (nn.MaxPool2d(2), 36), (nn.AvgPool2d(2), 100)]
)
def test_toy_p(pool: nn.Module, paths: int) -> None:
    """One 3x3 kernel of ones on a padded 4x4 image: average pools sum, max-pools keep the most paths."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), pool)
    assert count_paths(model, torch.ones(1, 1, 4, 4), {}) == paths


@pytest.mark.parametrize("bias", [True, False])
def test_toy_b(bias: bool) -> None:
    """A bias starts no path, so a unit that only a bias feeds stays dead."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=bias), nn.Conv2d(2, 1, 1, bias=bias))
    masks = {"0.weight": bools([[[[1]]], [[[0]]]])}
    assert count_paths(model, torch.ones(1, 1, 1, 1), masks) == 1
    found = effective_parameters(model, torch.ones(1, 1, 1, 1), masks)
    assert found["1.weight"].flatten().tolist() == [True, False]


@pytest.mark.slow
def test_counts_beyond_float64() -> None:
    """128 layers of width 64 have 64**129 paths; 256 layers more than float64 can hold."""
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(256)])
    expected = 257 * torch.tensor(64.0, dtype=torch.float64).log().item()
    assert log_paths(model, torch.ones(1, 64), {}) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(OverflowError):
        count_paths(model, torch.ones(1, 64), {})
    found = effective_parameters(model, torch.ones(1, 64), random_masks(model, 0.2, 0))
    assert all(bool(mask.any()) for mask in found.values())


# ---------------------------------------------------------------- one weight at a time

LINEAR = (
    "mlp mlp_bias conv_chain conv_free residual projection dense split shuffle depthwise multiplier grouped "
    "dilated strided dead_taps even_kernel rectangular reflected flatten adaptive_pool avg_pool tied "
    "transposed pixel_shuffle two_inputs two_outputs"
).split()
POSITIVE = [
    *LINEAR,
    "excite_sigmoid",
    "excite_hard",
    "glu_free",
    "layer_scale",
    "mixer",
    "dict_input",
    "conv1d",
]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("density", [0.6, 0.3])
def test_removing_one_weight(name: str, density: float) -> None:
    """With positive weights and no biases, a kept weight is effective iff the output changes without it."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    inputs = ones(inputs)
    masks = random_masks(model, density, seed=len(name))
    found = effective_parameters(model, inputs, masks)
    model = model.double().eval()
    weights = prunable(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in weights:
                parameter.copy_(masks[key] * (0.1 + 0.1 * torch.rand(parameter.shape)))
            elif key.endswith("bias"):
                parameter.zero_()
        before = run(model, inputs)
        for key, weight in weights.items():
            flat, effective = weight.view(-1), found[key].view(-1)
            for place in masks[key].view(-1).nonzero().flatten().tolist():
                value = flat[place].clone()
                flat[place] = 0.0
                changed = abs(run(model, inputs) - before) > 1e-11 * before
                flat[place] = value
                assert bool(effective[place]) == bool(changed), (key, place)
        assert not any(bool((effective & ~masks[key]).any()) for key, effective in found.items())


@pytest.mark.parametrize(
    "name", [name for name in LINEAR if name not in ("adaptive_pool", "avg_pool", "depthwise")]
)
def test_counting_is_the_network_on_ones(name: str) -> None:
    """Networks of ReLUs count their own paths when every weight is its mask (ReLU6 would cut them off)."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    inputs = ones(inputs)
    masks = random_masks(model, 0.5, seed=1)
    paths = count_paths(model, inputs, masks)
    model = model.double().eval()
    weights = prunable(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(masks[key] if key in weights else torch.zeros_like(parameter))
        total = run(model, inputs)
    if name == "two_inputs":  # its mean over 64 positions counts as a sum
        image = count_paths(model, inputs, {**masks, "vector.weight": torch.zeros(6, 5, dtype=torch.bool)})
        total = total - image / 64 + image
    assert paths == round(float(total))
    assert paths > 0


# ---------------------------------------------------------------- padding, precision, inputs


def test_padding_taps() -> None:
    """On a 1x1 map only the middle tap of a padded 3x3 kernel sees data; on a periodic image all do."""
    model, x = nn.Conv2d(2, 2, 3, padding=1), torch.ones(1, 2, 1, 1)
    middle = torch.zeros(3, 3, dtype=torch.bool)
    middle[1, 1] = True
    assert torch.equal(effective_parameters(model, x, {})["weight"], middle.expand(2, 2, 3, 3))
    assert bool(effective_parameters(model, x, {}, padding="circular")["weight"].all())


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_small_network(name: str) -> None:
    """No operation is unknown, precision does not matter, a periodic image never has fewer paths."""
    torch.manual_seed(0)
    model, x = NETS[name]()
    masks = random_masks(model, 0.3, 0)
    found = effective_parameters(model, x, masks)
    single = effective_parameters(model, x, masks, dtype=torch.float32)
    periodic = effective_parameters(model, x, masks, padding="circular")
    for key, mask in found.items():
        assert torch.equal(mask, single[key]), key
        assert not bool((mask & ~periodic[key]).any()), key
        assert not bool((mask & ~masks[key]).any()), key
    gradients = path_gradients(model, x, masks)
    if not any(kind in name for kind in ("max_pool", "conv3d", "reused")):  # a maximum hides other paths
        assert all(torch.equal((gradients[key] > 0) & masks[key], found[key]) for key in found)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 5, 4)),
        (
            nn.Conv2d(2, 3, (3, 5), stride=2, padding=(1, 2), dilation=(1, 1), padding_mode="circular"),
            (1, 2, 6, 8),
        ),
        (nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"), (1, 2, 7)),
    ],
)
def test_circular_means_what_torch_means(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """A zero-padded layer run as periodic equals torch's own circular layer."""
    other: Any = type(layer)(**{key: getattr(layer, key) for key in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")})  # fmt: skip
    masks = random_masks(layer, 0.4, 0)
    x = torch.ones(shape)
    expected = effective_parameters(layer, x, masks)
    assert torch.equal(
        effective_parameters(other, x, masks, padding="circular")["weight"], expected["weight"]
    )


def test_periodic_transposed_convolution_keeps_every_tap() -> None:
    """Cropped margins are added back on: each tap of each kernel is used."""
    model = nn.ConvTranspose2d(2, 2, 3, padding=1)
    x = torch.ones(1, 2, 1, 1)
    assert int(effective_parameters(model, x, {})["weight"].sum()) == 4
    assert bool(effective_parameters(model, x, {}, padding="circular")["weight"].all())


def test_shared_weights_have_one_mask() -> None:
    """A tied weight is effective if any of its uses is."""
    torch.manual_seed(0)
    model, x = NETS["tied"]()
    assert set(prunable(model)) == {"one.weight", "last.weight"}
    found = effective_parameters(model, x, {"one.weight": torch.eye(6, dtype=torch.bool)})
    assert torch.equal(found["one.weight"], torch.eye(6, dtype=torch.bool))


def test_standardised_kernels_are_masked_after_standardisation() -> None:
    """Re-centring a kernel does not revive what is pruned."""
    torch.manual_seed(0)
    model, x = NETS["standard"]()
    first = torch.zeros(6, 3, 3, 3, dtype=torch.bool)
    first[1, :, 1, 1] = True
    found = effective_parameters(model, x, {"0.weight": first})
    assert torch.equal(found["0.weight"], first)
    assert found["2.weight"].flatten(2).any(2).any(0).tolist() == [channel == 1 for channel in range(6)]


def test_integer_inputs_start_paths_where_they_are_looked_up() -> None:
    """Token ids start paths; position ids, which are no input, do not."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.left, self.right = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.left(self.tokens(ids)) + self.right(self.positions(torch.arange(ids.shape[1])))

    found = effective_parameters(Tokens(), torch.zeros(1, 5, dtype=torch.long), {})
    assert bool(found["left.weight"].all())
    assert not found["right.weight"].any()


def test_recurrence_reaches_forward_in_time() -> None:
    """An LSTM carries each step to the later ones only; in both directions it reaches all."""

    class Last(nn.Module):
        def __init__(self, bidirectional: bool) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 3, bias=False)  # one weight per pair of steps
            self.scan = nn.LSTM(2, 4, batch_first=True, bidirectional=bidirectional)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mix(x.transpose(1, 2)).transpose(1, 2)
            return self.scan(x)[0][:, 1]

    for bidirectional in (False, True):
        found = effective_parameters(Last(bidirectional), torch.ones(1, 3, 2), {})
        assert found["mix.weight"].any(1).tolist() == [True, True, bidirectional]


def test_meta_device() -> None:
    """A table of biases may be looked up by an index without values; live values may not."""

    class Lookup(nn.Module):
        index: Tensor

        def __init__(self, live: bool) -> None:
            super().__init__()
            self.linear, self.table, self.live = nn.Linear(4, 4), nn.Parameter(torch.ones(9)), live
            self.register_buffer("index", torch.arange(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            return x[:, self.index] if self.live else x + self.table[self.index]

    with torch.device("meta"):
        table, live = Lookup(live=False), Lookup(live=True)
    assert bool(effective_parameters(table, torch.ones(1, 4), {})["linear.weight"].all())
    with pytest.raises(UnknownOpError, match="meta"):
        effective_parameters(live, torch.ones(1, 4), {})


# ---------------------------------------------------------------- networks at large

FAMILIES = {
    "test_resnet": 64, "densenet121": 32, "test_efficientnet": 64, "test_convnext": 64, "test_vit": 160,
    "swin_tiny_patch4_window7_224": 224, "gmlp_ti16_224": 224, "test_coatnet": 160, "test_nfnet": 64,
    "regnetx_002": 32, "mobilenetv3_small_050": 32, "xcit_nano_12_p8_224": 224, "levit_128s": 224,
    "coat_tiny": 224, "cait_xxs24_224": 224, "convit_tiny": 224, "mobilevit_xxs": 64, "efficientvim_m1": 64,
    "mambaout_femto": 64, "starnet_s050": 64, "resnest14d": 32, "halonet_h1": 256,
}  # fmt: skip


LONG = {
    "cait_xxs24_224", "coat_tiny", "gmlp_ti16_224", "halonet_h1", "swin_tiny_patch4_window7_224",
    "xcit_nano_12_p8_224",
}  # fmt: skip
"""One to four seconds each; others of their kind stay in the default run."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in sorted(FAMILIES)]
)
def test_families(name: str) -> None:
    """Shapes and identities are enough: the models are on the meta device. Most weights lie on paths."""
    with torch.device("meta"):
        model = timm.create_model(name)
    x = torch.ones(1, 3, FAMILIES[name], FAMILIES[name])
    found = effective_parameters(model, x, {}, dtype=torch.float32)
    count = sum(mask.numel() for mask in found.values())
    assert count == sum(weight.numel() for weight in prunable(model).values())
    assert 0.2 * count < sum(int(mask.sum()) for mask in found.values()) <= count
