"""Writes into shared memory: what one name changes, every other name sees."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.paths.count import reach

Layer = Callable[[Tensor], Tensor]


class Written(nn.Module):
    """``wide`` makes four channels, ``narrow`` two, ``last`` reads what the function returns."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(3, 4, bias=False), nn.Linear(3, 2, bias=False)
        self.last, self.function = nn.Linear(4, 2, bias=False), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.wide(x), self.narrow(x)))


def _add_to_a_slice(y: Tensor, z: Tensor) -> Tensor:
    y[:, :2].add_(z)
    return y


def _add_to_a_named_slice(y: Tensor, z: Tensor) -> Tensor:
    view = y[:, :2]
    view += z
    return y


def _copy_into_a_slice(y: Tensor, z: Tensor) -> Tensor:
    y[:, :2].copy_(z)
    return y


def _copy_into_a_part_of_a_view(y: Tensor, z: Tensor) -> Tensor:
    y.view(-1, 2, 2).select(1, 0).copy_(z)
    return y


def _copy_into_a_transposed_view(y: Tensor, z: Tensor) -> Tensor:
    y.t()[:2].copy_(z.t())
    return y


def _zero_a_slice(y: Tensor, z: Tensor) -> Tensor:
    y.narrow(1, 0, 2).zero_()
    return y


def _set_an_entry_of_a_view(y: Tensor, z: Tensor) -> Tensor:
    y.view(-1, 2, 2)[:, 0] = z
    return y


def _write_to_the_whole_then_read_a_view(y: Tensor, z: Tensor) -> Tensor:
    left, right = y[:, :2], y[:, 2:]
    y.copy_(torch.cat([z, right.clone()], 1))
    return torch.cat([left, right], 1)


def _a_copy_is_not_written(y: Tensor, z: Tensor) -> Tensor:
    y.clone()[:, :2].copy_(z)
    return y


def _write_to_a_channels_last_view(y: Tensor, z: Tensor) -> Tensor:
    image = y.view(-1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    image[:, :2].squeeze(-1).squeeze(-1).copy_(z)
    return image.flatten(1)


def _write_under_a_mask_made_through_a_view(y: Tensor, z: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=torch.bool, device=y.device)
    before = mask | False
    mask.view(2, 2)[0].fill_(True)
    return y.masked_fill(mask, 0.0) + y.masked_fill(~before, 0.0) + torch.cat([z, z], 1)


def _turn_in_place(y: Tensor, z: Tensor) -> Tensor:
    rows = y.view(-1, 2, 2)
    first = rows[:, 0]
    rows.transpose_(1, 2)
    first.copy_(z)
    return rows[:, :, 1].repeat(1, 2)


def _write_to_what_was_moved_nowhere(y: Tensor, z: Tensor) -> Tensor:
    y.to(z.device).float().contiguous().type_as(z)[:, :2].copy_(z)
    return y


def _write_to_a_copy_of_another_type(y: Tensor, z: Tensor) -> Tensor:
    y.to(torch.float64)[:, :2].zero_()
    y.to(y.dtype, copy=True)[:, 2:].zero_()
    return y


# (rows of ``wide`` that are effective, whether ``narrow`` is)
CASES: list[tuple[Callable[[Tensor, Tensor], Tensor], list[int], bool]] = [
    (_add_to_a_slice, [1, 1, 1, 1], True),
    (_add_to_a_named_slice, [1, 1, 1, 1], True),
    (_copy_into_a_slice, [0, 0, 1, 1], True),
    (_copy_into_a_part_of_a_view, [0, 0, 1, 1], True),
    (_copy_into_a_transposed_view, [0, 0, 1, 1], True),
    (_zero_a_slice, [0, 0, 1, 1], False),
    (_set_an_entry_of_a_view, [0, 0, 1, 1], True),
    (_write_to_the_whole_then_read_a_view, [0, 0, 1, 1], True),
    (_write_to_a_channels_last_view, [0, 0, 1, 1], True),
    (_write_under_a_mask_made_through_a_view, [0, 0, 1, 1], True),
    (_turn_in_place, [0, 0, 1, 1], False),
    (_write_to_what_was_moved_nowhere, [0, 0, 1, 1], True),
    (_write_to_a_copy_of_another_type, [1, 1, 1, 1], False),
    (_a_copy_is_not_written, [1, 1, 1, 1], False),
]


@pytest.mark.parametrize(("function", "wide", "narrow"), CASES)
def test_write(function: Callable[[Tensor, Tensor], Tensor], wide: list[int], narrow: bool) -> None:
    """The weights that the output really depends on, by its own derivative and by the graph."""
    model, x = Written(function), torch.rand(2, 3)
    model(x).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gm = capture(model, x)
    for captured in (gm, copy.deepcopy(gm)):
        found = reach(lower(captured), {})
        assert found["wide.weight"].any(1).int().tolist() == wide
        assert bool(found["narrow.weight"].all()) == narrow
        for name in ("wide.weight", "narrow.weight"):
            own = gradients[name]
            assert torch.equal(found[name], torch.zeros_like(found[name]) if own is None else own != 0)


class Sorted(nn.Module):
    """Rows in the order of a score, through a layer, and back by the inverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.inner, self.last = nn.Linear(3, 1), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.argsort(self.score(x)[:, 0])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0))
        return self.last(self.inner(x[order])[inverse])


def test_a_write_at_an_index_that_depends_on_the_input() -> None:
    """An index that was written chooses rows: any may be read, and no path runs through the choice."""
    model, x = Sorted(), torch.rand(5, 3)
    graph = lower(capture(model, x), strict=True)
    assert not graph.opaque
    model(x).sum().backward()
    found = reach(graph, {})
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert bool(found[name].all()) == (parameter.grad is not None), name


def test_memory_without_numbers_is_no_index() -> None:
    """Part of it is written, and then all of it: only then are its numbers known."""

    class Unwritten(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.first, self.last, self.count = nn.Linear(3, 4), nn.Linear(4, 2), count

        def forward(self, x: Tensor) -> Tensor:
            index = torch.empty(4, dtype=torch.long)
            index[: self.count].fill_(3)
            return self.last(self.first(x)[:, index.view(2, 2).flatten()])

    def rows(count: int) -> list[bool]:
        graph = lower(capture(Unwritten(count), torch.rand(5, 3)), strict=True)
        return reach(graph, {})["first.weight"].any(1).tolist()

    assert rows(0) == [True, True, True, True]
    assert rows(4) == [False, False, False, True]


def test_memory_that_is_written_as_another_type_is_opaque() -> None:
    """Whole numbers where there were floats: what they mean is not known, so everything may reach them."""

    def function(y: Tensor, z: Tensor) -> Tensor:
        y.view(torch.int32).zero_()
        return y

    graph = lower(capture(Written(function), torch.rand(5, 3)))
    assert [(op.node, op.reason) for op in graph.opaque] == [
        ("view", "memory seen as another type"),
        ("zero_", "memory seen as another type"),
    ]
    assert bool(reach(graph, {})["wide.weight"].all())
