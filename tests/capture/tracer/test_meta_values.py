"""Shapes of results, worked out without numbers: as those of the operation itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture.tracer.meta_values import ACTIVATIONS, Shadows


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False, track_running_stats=False)]
)
def test_batch_norms(layer: Any, dtype: torch.dtype, training: bool) -> None:
    layer = layer.to(dtype)
    images = torch.randn(2, 3, 4, 5, dtype=dtype)
    for x in (images, images.to(memory_format=torch.channels_last)):
        use = training or not layer.track_running_stats
        statistics = (layer.running_mean, layer.running_var)
        args = (x, layer.weight, layer.bias, *statistics, use, 0.1, 1e-5, False)
        meta = Shadows().run(torch.batch_norm, args, {})
        real: Tensor = torch.batch_norm(*args)
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_a_batch_norm_of_other_channels_fails_as_ever() -> None:
    x, wrong = torch.ones(2, 3, 4, 4), torch.ones(5)
    with pytest.raises(RuntimeError):
        Shadows().run(torch.batch_norm, (x, wrong, wrong, wrong, wrong, False, 0.1, 1e-5, False), {})


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_keeps_the_shape_keeps_strides_and_type(layout: str, dtype: torch.dtype) -> None:
    """PyTorch's own result in shapes is the reference."""
    x = LAYOUTS[layout](torch.empty(2, 4, 3, 5, dtype=dtype, device="meta"))
    for function in ACTIVATIONS:
        found = Shadows().run(function, (x,), {})
        wanted = function(x)
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert Shadows().run(F.relu, (x, True), {}) is x
    for training in (False, True):
        statistics = [torch.empty(x.shape[1], device="meta") for _ in range(2)]
        found = Shadows().run(F.batch_norm, (x, *statistics), {"training": training})
        assert (found.shape, found.dtype) == (x.shape, dtype)


def test_a_batch_norm_of_single_values_is_refused_as_ever() -> None:
    x, statistics = torch.empty(1, 3, device="meta"), [torch.empty(3, device="meta") for _ in range(2)]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Shadows().run(F.batch_norm, (x, *statistics), {"training": True})


@pytest.mark.parametrize(
    "change",
    [
        lambda run, x: run(Tensor.to, (x, torch.float32), {}),
        lambda run, x: run(Tensor.contiguous, (x,), {}),
        lambda run, x: run(torch.as_tensor, (x,), {}),
        lambda run, x: run(torch.broadcast_tensors, (x, x), {})[1],
    ],
)
def test_numbers_of_a_result_that_is_its_operand(change: Callable[..., Tensor]) -> None:
    shadows = Shadows()
    x = shadows.run(torch.arange, (3.0,), {})
    assert torch.equal(shadows.value(change(shadows.run, x)), torch.arange(3.0))
