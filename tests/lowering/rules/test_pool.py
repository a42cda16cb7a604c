"""Windows and reductions along an axis: against the oracle, or the same paths in plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.capture import capture
from fxprune.lowering import lower
from lowering.wrapped import Entries, check, check_against

TOKENS, IMAGE = (4, 6), (2, 4, 4)
SHAPES = {1: (2, 5), 2: (2, 4, 3), 3: (1, 3, 3, 3)}
MODULES = {
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "adaptive maximum": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    "adaptive average": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
FUNCTIONS = {
    "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
    "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    "adaptive maximum": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    "adaptive average": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("rank", SHAPES)
def test_a_pool_by_module_and_by_function(kind: str, rank: int) -> None:
    """Every entry is a channel of its own, alive or dead. Equal entries have no derivative of a maximum."""
    module, function = MODULES[kind][rank - 1], FUNCTIONS[kind][rank - 1]
    for op in (lambda: module(2), lambda x: function(x, 2)):
        check(op, SHAPES[rank], kinds=(Entries,), derivatives=False)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(nn.FractionalMaxPool2d(2, 2), "fractional_max_pool2d"), (nn.Fold(2, 1), "fold of a single sample")],
)
def test_what_has_no_rule_says_so(layer: Callable[[Tensor], Tensor], reason: str) -> None:
    shape = (1, 4, 4) if isinstance(layer, nn.Fold) else (1, 2, 4, 4)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(shape[-1], shape[-1]), layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.layer(y[0] if isinstance(layer, nn.Fold) else y)

    (op,) = lower(capture(Around(), torch.ones(shape))).opaque
    assert reason in op.reason


def _triangle(x: Tensor) -> Tensor:
    """Running sums along the tokens."""
    return torch.stack([x[:, : i + 1].sum(1) for i in range(x.shape[1])], 1)


def _difference(x: Tensor) -> Tensor:
    return x[:, 1:] + x[:, :-1]


FORMS: dict[str, Any] = {
    "cumprod": (lambda x: x.cumprod(1), lambda x: _triangle(x.sigmoid()), TOKENS),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), lambda x: _triangle(x.sigmoid()), TOKENS),
    "logsumexp": (lambda x: x.logsumexp(-1), lambda x: x.sigmoid().sum(-1), TOKENS),
    "prod": (lambda x: x.prod(1), lambda x: x.amax(1), TOKENS),
    "quantile": (lambda x: x.quantile(0.5, dim=-1, keepdim=True), lambda x: x.amax(-1, keepdim=True), TOKENS),
    "diff": (lambda x: x.diff(dim=1), _difference, TOKENS),
    "diff twice": (lambda x: x.diff(n=2, dim=1), lambda x: _difference(_difference(x)), TOKENS),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), lambda x: F.avg_pool2d(x, 2), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_paths_are_those_of_the_plain_form(name: str) -> None:
    check_against(*FORMS[name])
