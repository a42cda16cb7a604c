"""Shapes of results, worked out without numbers: as those of the operation itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture.tracer.meta_values import Shadows


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
