"""Leaves of one form are traced once, and only those whose insides are equal are of one form."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import timm
import torch
from thinning import one_in
from torch import Tensor, nn

from fxprune.capture import capture, capture_leaf
from fxprune.capture.leaf_forms import leaf_form
from fxprune.lowering import lower

X = torch.ones(2, 4, 6, 6)


class Part(nn.Module):
    """A leaf whose code follows its attributes."""

    def __init__(self, power: float = 2.0, tied: bool = False, names: Any = ("a",)) -> None:
        super().__init__()
        self.power, self.names = power, names
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.two(self.one(x)) ** self.power * scale
        return y if "a" in self.names else -y


def with_table(part: Part) -> Part:
    part.table = torch.ones(3)
    return part


def with_hook(part: Part) -> Part:
    part.one.register_forward_hook(lambda module, args, out: 2 * out)
    return part


def with_forward(part: Part) -> Part:
    part.forward = lambda x: x  # type: ignore[method-assign]
    return part


class Other(Part):
    pass


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "number": lambda: Part(3.0),
    "its type": lambda: Part(2),
    "tied": lambda: Part(tied=True),
    "text": lambda: Part(names=("b",)),
    "kind of collection": lambda: Part(names=["a"]),
    "class": lambda: Other(),
    "part's class": lambda: swap(Part(), nn.Conv2d(4, 4, 1, bias=False)),
    "part's attribute": lambda: swap(Part(), nn.Conv2d(4, 4, 1, padding=1)),
    "type of numbers": lambda: Part().double(),
    "frozen": lambda: Part().requires_grad_(False),
    "forward of its own": lambda: with_forward(Part()),
}


def swap(part: Part, conv: nn.Conv2d) -> Part:
    part.two = conv
    return part


def test_equal_modules_have_one_form() -> None:
    assert leaf_form(Part(), (X,), {}) == leaf_form(Part().eval(), (X,), {})
    assert hash(leaf_form(Part(), (X,), {})) == hash(leaf_form(Part(), (X,), {}))


@pytest.mark.parametrize("what", OTHERS)
def test_any_difference_makes_another_form(what: str) -> None:
    assert leaf_form(Part(), (X,), {}) != leaf_form(OTHERS[what](), (X,), {})


class Ordered(nn.Module):
    """A leaf that looks at the numbers in a buffer which is no state."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return 2 * y if bool((self.order == 0).any()) else y


def test_numbers_that_a_trace_can_read_belong_to_the_form() -> None:
    traced: dict[Any, Any] = {}
    for part in (Ordered([0, 1]).eval(), Ordered([1, 2]).eval(), Ordered([0, 1]).eval()):
        assert torch.equal(capture_leaf(part, (X,), {}, traced=traced)(X), part(X))
    assert len(traced) == 2


def test_arguments_belong_to_the_form() -> None:
    base = leaf_form(Part(), (X,), {})
    for args, kwargs in (((X[:1],), {}), ((X.double(),), {}), ((X,), {"scale": 2.0}), ((X, 1.0), {})):
        assert leaf_form(Part(), args, kwargs) not in (base, None)
    attention = nn.MultiheadAttention(4, 2)
    x, y = torch.ones(3, 2, 4), torch.ones(3, 2, 4)
    assert leaf_form(attention, (x, x, x), {}) != leaf_form(attention, (x, y, x), {})


@pytest.mark.parametrize("change", [with_table, with_hook])
def test_what_may_hold_anything_has_no_form(change: Callable[[Part], Part]) -> None:
    assert leaf_form(change(Part()), (X,), {}) is None


def test_a_known_form_takes_its_trace_with_parameters_of_its_own() -> None:
    traced: dict[Any, Any] = {}
    parts = Part().eval(), Part().eval(), Part(3.0).eval()
    opened = [capture_leaf(part, (X,), {}, traced=traced) for part in parts]
    assert len(traced) == 2
    for part, gm in zip(parts, opened, strict=True):
        assert torch.equal(gm(X), part(X))


@pytest.mark.slow
@pytest.mark.parametrize("name", one_in(2, ["mobilenetv3_small_050", "regnety_002"]))
def test_a_network_lowers_to_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(name).eval()
    gm = capture(model, torch.empty(2, 3, 64, 64, device="meta"))
    shared = lower(gm)
    monkeypatch.setattr(import_module("fxprune.capture.entry"), "leaf_form", lambda *given: None)
    assert lower(gm) == shared
