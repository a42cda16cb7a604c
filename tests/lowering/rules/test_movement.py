"""Rules of data movement, padding, pooling and resizing: every spelling against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowering.wrapped import Entries, Natural, check, check_against

TOKENS = (5, 8)
IMAGE = (4, 4, 5)


def _written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 2:] = x[:, :-2]
    return y


def _overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    y[:, 1] = x[:, 2]
    return y


def _added_to(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] += x[:, 2:4]
    return y


def _new_rows(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 7, x.shape[2])
    y[:, 1:6] = x
    return y


def _assembled(x: Tensor) -> Tensor:
    parts = [x[:, i] * 2 for i in range(5)]
    return torch.stack(parts[::-1], dim=1)


ON_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "no tokens taken off, and none put back": lambda x: torch.cat([x[:, :0], x.relu()[:, 0:]], 1),
    "a sum over nothing": lambda x: x + x[:, :0].sum(1, keepdim=True),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll((1, 3), (1, 2)),
    "cat with a constant": lambda x: torch.cat([torch.ones(x.shape[0], 1, 8), x], 1),
    "cat with zeros": lambda x: torch.cat([torch.zeros(x.shape[0], 1, 8), x], 1),
    "stack": _assembled,
    "narrow and select": lambda x: x.narrow(1, 1, 3) + x.select(1, 0).unsqueeze(1),
    "index by a list": lambda x: x[:, [3, 0, 0]],
    "index by a tensor": lambda x: x[:, torch.tensor([4, 1])],
    "index_select": lambda x: x.index_select(2, torch.tensor([7, 0, 2])),
    "gather": lambda x: x.gather(1, torch.tensor([[[0], [2]]]).expand(x.shape[0], -1, 8)),
    "a step": lambda x: x[:, ::2, 1::3],
    "none and ellipsis": lambda x: x[..., None, 2:].squeeze(2),
    "negative": lambda x: x[:, -1:, :-3],
    "uneven split": lambda x: torch.cat(x.split([1, 4], 1)[::-1], 1),
    "chunk with a rest": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "unbind": lambda x: sum(x.unbind(1)[1:], x[:, 0]),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=2),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1) + x[:, :3],
    "tril": lambda x: x.tril(),
    "unflatten": lambda x: x.unflatten(2, (2, 4)).transpose(2, 3).flatten(2),
    "unfold of a tensor": lambda x: x.unfold(1, 3, 1).flatten(2),
    "reshape_as": lambda x: x.transpose(1, 2).reshape_as(x),
    "view_as": lambda x: x.transpose(1, 2).contiguous().view_as(x),
    "meshed with its transpose": lambda x: x[:, :, None] + x[:, None],
    "setitem into zeros": _written,
    "setitem over": _overwritten,
    "in place on a slice": _added_to,
    "setitem into new_zeros": _new_rows,
    "cumsum": lambda x: x.cumsum(1),
    "where, a constant condition": lambda x: torch.where(torch.arange(8) > 3, x, x.roll(1, 1)),
    "where, else zero": lambda x: torch.where(torch.arange(8) > 3, x, 0.0) * x.flip(1),
    "where, else one": lambda x: torch.where(torch.arange(8) > 3, x, 1.0) * x.flip(1),
    "masked_fill with zero": lambda x: x.masked_fill(torch.arange(8) > 3, 0.0) * x.flip(1),
    "masked_fill with a number": lambda x: x.masked_fill(torch.arange(8) > 3, 2.0) * x.flip(1),
    "masked_fill before a softmax": lambda x: (
        (x @ x.transpose(1, 2)).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ x
    ),
    "-inf added before a softmax": lambda x: (
        (x @ x.transpose(1, 2) + torch.full((5, 5), -torch.inf).triu(1)).softmax(-1) @ x
    ),
    "pad": lambda x: F.pad(x, (1, 2)) * F.pad(x, (2, 1)),
    "pad with a number": lambda x: F.pad(x, (1, 2), value=1.0) * F.pad(x, (2, 1)),
    "pad, negative": lambda x: F.pad(x, (-1, 2, 1, -2)),
    "max of two": lambda x: torch.maximum(x, x.flip(1)),
    "max over all": lambda x: x.amax((1, 2)),
    "sum spelled by axis": lambda x: x.sum(axis=1, keepdim=True) + x,
    "mean of two axes": lambda x: x.mean((1, 2), True) * x,
}  # fmt: skip
TIES = ("max over all",)
# Numbers other than zero around an image are no part of it: the oracle takes them for a border all the same.
FILLED = ("pad with a number", "nn.ConstantPad2d")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ON_TOKENS)
def test_tokens(name: str) -> None:
    check(ON_TOKENS[name], TOKENS, derivatives=name not in TIES, periodic=name not in FILLED)


def _patched(x: Tensor) -> Tensor:
    patches = F.unfold(x, (2, 3), padding=(0, 1), stride=(2, 1))
    return F.fold(patches.flip(2), (4, 5), (2, 3), padding=(0, 1), stride=(2, 1))


def _partitioned(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width)
    return x.transpose(2, 3).reshape(batch, channels, height, width)


ON_IMAGES: dict[str, Any] = {
    "channel pad": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)) * F.pad(x, (0, 0, 0, 0, 2, 1)),
    "asymmetric pad": lambda x: F.conv2d(F.pad(x, (0, 2, 1, 0)), torch.ones(2, 4, 3, 3)),
    "pad with a number": lambda x: F.pad(x, (1, 1, 1, 1), value=0.5) * F.pad(x, (2, 0, 2, 0)),
    "reflected": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "replicated": lambda: nn.ReplicationPad2d(1),
    "circular": lambda: nn.CircularPad2d((1, 2, 0, 1)),
    "nn.ZeroPad2d": lambda: nn.ZeroPad2d((1, 0, 2, 0)),
    "nn.ConstantPad2d": lambda: nn.ConstantPad2d(1, 3.0),
    "unfold and fold": _patched,
    "nn.Unfold": lambda: nn.Unfold(2, padding=1),
    "view into parts": _partitioned,
    "pixel shuffle": lambda: nn.PixelShuffle(2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x[..., :4], 2),
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "space to depth": lambda x: torch.cat([x[..., ::2, :4:2], x[..., 1::2, 1::2]], 1),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool, ceil": lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "max pool, dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "max pool over rows": lambda: nn.MaxPool2d((2, 1)),
    "average pool": lambda: nn.AvgPool2d(2),
    "average pool, ceil": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "average pool, padded": lambda: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    "average pool, divisor": lambda x: F.avg_pool2d(x, 2, stride=1, divisor_override=3),
    "average pool over columns": lambda x: F.avg_pool2d(x, (1, 3), (1, 2)),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "adaptive average of rows": lambda: nn.AdaptiveAvgPool2d((None, 1)),
    "adaptive maximum": lambda: nn.AdaptiveMaxPool2d((3, 2)),
    "pool of a flat map": lambda x: F.max_pool1d(F.avg_pool1d(x.flatten(2), 3, 2), 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, size=(3, 7), mode="nearest"),
    "nearest-exact": lambda x: F.interpolate(x, size=(3, 7), mode="nearest-exact"),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear, corners aligned": lambda x: F.interpolate(x, (6, 7), mode="bilinear", align_corners=True),
    "bilinear, smaller": lambda x: F.interpolate(x, (2, 3), mode="bilinear"),
    "nn.UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "cumsum over rows": lambda x: torch.cumsum(x, dim=2),
}  # fmt: skip
# A maximum over equal counts has no unique derivative.
MAXIMA = {name for name in ON_IMAGES if "max" in name} | {"pool of a flat map"}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ON_IMAGES)
def test_images(name: str) -> None:
    check(ON_IMAGES[name], IMAGE, derivatives=name not in MAXIMA, periodic=name not in FILLED)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda: nn.MaxPool3d(2, ceil_mode=True), (2, 3, 3, 3)),
        (lambda: nn.AvgPool3d(2, 1), (2, 3, 3, 3)),
        (lambda: nn.AdaptiveAvgPool3d(2), (2, 3, 3, 3)),
        (lambda: nn.Conv3d(2, 2, 2, padding=1), (2, 3, 3, 3)),
        (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2), (2, 2, 2, 2)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (2, 2, 2, 2)),
    ],
)
def test_volumes(function: Any, shape: tuple[int, ...]) -> None:
    check(function, shape, kinds=(Entries,), derivatives=False)


def test_natural_positions_stay_collapsed() -> None:
    """A movement of whole positions does not tell them apart."""
    check(lambda x: x.permute(0, 2, 3, 1).roll(1, 1).permute(0, 3, 1, 2), IMAGE, kinds=(Natural,))


def test_padding_without_a_value_is_with_zeros() -> None:
    check(lambda x: torch.constant_pad_nd(x, (1, 2)), TOKENS)


FORMS: dict[str, Any] = {
    "meshgrid": (
        lambda x: torch.stack(torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")).expand(len(x), -1, -1, -1),
        lambda x: torch.stack([x[0, 0][:, None].expand(-1, 6), x[0, 1][None].expand(6, -1)])
        .expand(len(x), -1, -1, -1), (4, 6)),
    "fftshift": (lambda x: torch.fft.fftshift(x, dim=1), lambda x: x.roll(2, 1), (4, 6)),
    "block_diag": (
        lambda x: torch.block_diag(x[0, :1], x[0, 1:])[None].expand(len(x), -1, -1),
        lambda x: torch.cat([F.pad(x[0, :1], (0, 6)), F.pad(x[0, 1:], (6, 0))]).expand(len(x), -1, -1),
        (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_paths_are_those_of_the_plain_form(name: str) -> None:
    check_against(*FORMS[name])
