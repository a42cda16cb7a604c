"""``Tensor.type`` reads the name of a type, and changes a tensor to one; a device of a device is it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import capture

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "read off": lambda y, x: y.type(x.type()),
    "named": lambda y, x: y.type("torch.DoubleTensor").float(),
    "class": lambda y, x: y.type(torch.DoubleTensor).type(torch.float32),
    "keyword": lambda y, x: y.type(dtype=torch.float32),
    "compared": lambda y, x: y.float() if x.type() == "torch.FloatTensor" else y.double(),
}


class Typed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + KINDS[self.kind](torch.arange(4, device=x.device), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:capture")
def test_types_are_read_and_changed_by_name(kind: str) -> None:
    model, x = Typed(kind), torch.randn(2, 3)
    gm = capture(model, x)
    out = gm(x)
    assert torch.equal(out, model(x))
    assert out.dtype == torch.float32
    if kind == "read off":  # it follows the type
        assert torch.equal(gm.double()(x.double()), model.double()(x.double()))
        assert gm(x.double()).dtype == torch.float64


class NumberTypes(nn.Module):
    """Asks for types of numbers by Python's own types."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.zeros(x.shape[0], 1, dtype=int) + (x > 0).sum(-1, keepdim=True, dtype=int)
        scale = torch.arange(4, dtype=float).to(x.dtype) * torch.full((4,), 2, dtype=complex).real.to(float)
        return self.layer(x.to(float).to(x.dtype)) * scale.float() * x[:, :1].to(bool) + shift


def test_python_s_types_stand_for_those_of_tensors() -> None:
    model, x = NumberTypes(), torch.randn(2, 3)
    gm = capture(model, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm(torch.cat([x, -x])), model(torch.cat([x, -x])))


class Placed(nn.Module):
    """Makes tensors where its input is, in the ways that code has for it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "region":
            with torch.device(x.device):
                y = torch.arange(4.0) + torch.ones(4)
        elif self.kind == "nested":
            with torch.device("cpu"), x.device:
                y = torch.arange(4.0)
        else:
            y = torch.arange(4.0, device=torch.device(x.device))
        return self.layer(x) + y + torch.zeros(4, device=x.device)


@pytest.mark.parametrize("kind", ["region", "nested", "device"])
def test_devices_of_devices_follow_the_tensor(kind: str) -> None:
    model, x = Placed(kind), torch.randn(2, 3)
    gm = capture(model, x)
    assert "meta" not in gm.code
    assert torch.equal(gm(x), model(x))
    assert gm.to("meta")(x.to("meta")).shape == (2, 4)  # on another device, too
