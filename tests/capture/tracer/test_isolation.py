"""Caches of every form are left as they were, and so are the random generators."""

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn

from capture.untouched import assert_untouched, random_states
from fxprune.capture import CaptureError, capture, capture_own
from fxprune.capture.tracer.isolation import ModelState
from fxprune.capture.tracer.reachable import Reachable

TABLES: dict[str, Any] = {"deep": {}}
LAST: Tensor | None = None


def cached_in_closure(function: Callable[..., Any]) -> Callable[..., Any]:
    cached = functools.lru_cache(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return cached(*args)

    return call


class ClosureCache(nn.Module):
    @cached_in_closure
    def table(self, size: int) -> Tensor:
        return torch.arange(size).float()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.shape[1])


class MethodCache(nn.Module):
    @staticmethod
    @functools.lru_cache
    def table(size: int) -> Tensor:
        return torch.arange(size).float()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.shape[1])


class GlobalCache(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in TABLES["deep"]:
            TABLES["deep"][x.shape[1]] = torch.arange(x.shape[1]).float()
        return x + TABLES["deep"][x.shape[1]]


class GlobalName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        if LAST is None:
            LAST = torch.arange(x.shape[1]).float()
        return x + LAST


class ClassCache(nn.Module):
    table: ClassVar[Tensor | None] = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            type(self).table = torch.arange(x.shape[1]).float()
        return x + self.table


class Helper:
    def __init__(self) -> None:
        self.tables: OrderedDict[int, Tensor] = OrderedDict()
        self.order: deque[Tensor] = deque(maxlen=2)

    def __call__(self, size: int) -> Tensor:
        if size not in self.tables:
            self.tables[size] = torch.arange(size).float()
            self.order.append(self.tables[size])
        return self.order[-1]


class HelperCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.helpers = [{"table": Helper()}]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.helpers[0]["table"](x.shape[1])


def remembered(size: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return known.setdefault(size, torch.arange(size).float())


class DefaultCache(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + remembered(x.shape[1])


def variable() -> Callable[[int], Tensor]:
    last: Tensor | None = None

    def table(size: int) -> Tensor:
        nonlocal last
        if last is None:
            last = torch.arange(size).float()
        return last

    return table


class VariableCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = variable()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.shape[1])


class CacheThenFailure(GlobalCache):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.sum())


CACHES = [
    ClosureCache, MethodCache, GlobalCache, GlobalName, ClassCache, HelperCache, DefaultCache, VariableCache,
    CacheThenFailure,
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("build", CACHES)
def test_no_cache_keeps_a_shape_only_tensor(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLES, "deep", {})
    monkeypatch.setattr(ClassCache, "table", None)
    for model in (build(), nn.Sequential(build(), nn.Linear(5, 5))):
        assert_untouched(lambda model=model: model, (torch.ones(2, 5),), fresh_first=True)


@functools.lru_cache
def word(name: str) -> str:
    return name.upper()


class AsksForWords(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(word("two"))


def test_what_a_cache_knew_before_is_kept_if_nothing_was_added() -> None:
    word("two")
    capture(AsksForWords(), torch.ones(2))
    assert word.cache_info().currsize == 1


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random() * numpy.random.rand() + torch.rand(1)


@pytest.mark.filterwarnings("ignore:capture")
def test_random_generators_are_given_back() -> None:
    state = random_states()
    with pytest.raises(CaptureError):
        capture_own(Draws(), torch.ones(2))
    assert random_states() == state
    capture(nn.Sequential(Draws()), torch.ones(2))
    assert random_states() == state


def test_generators_of_the_models_own_are_given_back() -> None:
    model = nn.Identity()
    model.dice = random.Random(0), numpy.random.default_rng(0), torch.Generator().manual_seed(0)
    state = ModelState(model)
    first = [model.dice[0].random(), model.dice[1].random(), float(torch.rand(1, generator=model.dice[2]))]
    state.restore()
    again = [model.dice[0].random(), model.dice[1].random(), float(torch.rand(1, generator=model.dice[2]))]
    assert first == again


class MoreInTraining(nn.Module):
    """Gives a mean of an inner layer in training, and a number in its place in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.a(x)).relu()
        out = self.c(self.b(y).relu())
        return out, (y * y).mean(1) if self.training else out.new_zeros(1)


def test_a_network_that_was_captured_and_is_captured_again_stays_in_evaluation() -> None:
    x = torch.ones(3, 3, 8, 6)
    network = capture(MoreInTraining().eval(), x)
    again = capture(network, x)
    for one in (network, again):
        assert not any(module.training for module in one.modules())
        assert torch.equal(one(x)[1], torch.zeros(1))


class Asserts(nn.Module):
    """Has an assertion, which pytest rewrites to a call of its own code."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return x + 1


def test_an_assertion_in_a_model_does_not_lead_to_the_test_run(request: pytest.FixtureRequest) -> None:
    reached = [container.value for container in Reachable(Asserts()).containers]
    assert len(reached) < 100
    assert not any(value is vars(request.config) for value in reached)
