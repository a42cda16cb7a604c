"""Contractions without prunable weights: named, and counted as torch counts what runs."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from thinning import one_in
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.channels.unpruned import contractions
from fxprune.graph import ChannelGraph


def torch_macs(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...]) -> float:
    """Half of the operations that torch counts while the model runs; fused kernels are not counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


def our_macs(graph: ChannelGraph) -> int:
    products = sum(one.macs for one in contractions(graph))
    return products + sum(kernels.macs for kernels in graph.kernels.values())


def lowered(model: nn.Module, *inputs: Any) -> ChannelGraph:
    return fxprune.lower(fxprune.capture(model, inputs))


TIMM: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {"depths": (2, 1, 1, 1)},
    "xcit_nano_12_p16_224": {"depth": 2},  # attention between channels
    # cosine attention; layers that read a table, once for all samples
    "swinv2_cr_tiny_ns_224": {"depths": (2, 1, 1, 1)},
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", one_in(2, TIMM))
def test_timm_against_torch(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **TIMM[name]).eval()
    side = model.pretrained_cfg["input_size"][-1]
    graph = fxprune.lower(fxprune.capture(model))
    assert our_macs(graph) == torch_macs(model, (torch.empty(1, 3, side, side, device="meta"),))


@pytest.mark.slow
def test_bert_against_torch() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )
    model = transformers.BertModel(config).eval()
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    graph = fxprune.lower(fxprune.capture(model, inputs))
    assert our_macs(graph) == torch_macs(model, inputs) / 2
    assert [one.name for one in contractions(graph)] == [
        f"encoder.layer.{i}.attention.self" for i in range(2)
    ]
    assert all(one.macs == 2 * 7 * 7 * 24 for one in contractions(graph))


class DynamicConvolution(nn.Module):
    """A convolution whose weights are made from the input, one with fixed ones, one with computed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.maker = nn.Conv2d(3, 4, 1), nn.Linear(3, 6 * 2 * 9)
        self.left, self.right = nn.Parameter(torch.rand(5, 6, 1, 1)), nn.Parameter(torch.rand(5, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(x.mean((0, 2, 3))).view(6, 2, 3, 3)
        y = F.conv2d(self.stem(x), weight, stride=2, padding=1, groups=2)
        y = F.conv2d(y, torch.ones(6, 1, 2, 2), groups=6)
        return F.conv2d(y, self.left + self.right)


def test_convolutions_with_computed_weights() -> None:
    x = torch.rand(2, 3, 8, 8)
    graph = lowered(DynamicConvolution(), x)
    macs = {one.name: one.macs for one in contractions(graph)}
    assert macs == {"conv2d": 4 * 4 * 6 * 2 * 9, "conv2d_1": 3 * 3 * 6 * 4, "conv2d_2": 3 * 3 * 5 * 6}
    # One weight is made for both samples, which is counted whole.
    assert our_macs(graph) == (torch_macs(DynamicConvolution(), (x,)) + 3 * 6 * 2 * 9) / 2


class Frames(nn.Module):
    """Layers that see every frame of a sample as a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1)).mean((2, 3))
        return self.linear(y).unflatten(0, (x.shape[0], -1))


def test_frames_of_a_sample_are_all_counted() -> None:
    x = torch.rand(2, 5, 3, 6, 6)
    assert our_macs(lowered(Frames(), x)) == torch_macs(Frames(), (x,)) / 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


@pytest.mark.slow
def test_recurrent_layers_count_their_gates() -> None:
    model = Recurrent()
    graph = lowered(model, torch.rand(2, 7, 3))
    matrices = sum(p.numel() for name, p in model.named_parameters() if "weight" in name)
    assert our_macs(graph) == 7 * matrices
    assert contractions(graph) == ()


class Tables(nn.Module):
    """A product of two constants is done once, when the network is loaded or folded: it is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4, bias=False), nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (self.table @ self.table)[0]


def test_products_of_constants_are_not_counted() -> None:
    graph = lowered(Tables(), torch.rand(2, 4))
    assert contractions(graph) == ()


class TwoProducts(nn.Module):
    """Two attentions fed by layers of one module, and a product that no named layer feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "v", "out")})

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.block["q"](q), self.block["k"](k), self.block["v"](v)
        return self.block["out"]((q @ k.mT).softmax(-1) @ v)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ x.mT @ x
        return self.attend(self.attend(x, x, x), x, x)


def test_names_are_told_apart() -> None:
    found = contractions(lowered(TwoProducts(), torch.rand(2, 3, 4)))
    assert [one.name for one in found] == ["matmul", "block (matmul_2)", "block (matmul_4)"]
    assert [len(one.ops) for one in found] == [2, 2, 2]
