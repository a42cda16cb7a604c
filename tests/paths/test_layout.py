"""Layouts against full tensors: what is stored once, and how it is read again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.paths.layout import (
    AxisMap,
    Layout,
    broadcast,
    collapsed,
    explicit,
    full_labels,
    join,
    layout_of_labels,
    reader,
    reduced_shape,
)

PAIRS = AxisMap(4, 2, torch.tensor([0, 1, 0, 1]))
HALVES = AxisMap(4, 2, torch.tensor([0, 0, 1, 1]))


def full(reduced: Tensor, layout: Layout) -> Tensor:
    """The tensor that a reduced one stands for, entry by entry."""
    for dim, axis in enumerate(layout):
        reduced = torch.stack([reduced.select(dim, int(i)) for i in axis.index()], dim)
    return reduced


def test_axes_count_their_classes() -> None:
    for axis, multiplicity, first in (
        (collapsed(3), [3], [0]),
        (explicit(3), [1, 1, 1], [0, 1, 2]),
        (AxisMap(4, 2, torch.tensor([0, 0, 1, 0])), [3, 1], [0, 2]),
    ):
        assert axis.multiplicity().tolist() == multiplicity
        assert axis.representatives().tolist() == first


def test_the_coarsest_layout_of_a_tensor() -> None:
    labels = torch.tensor([[[1, 2, 1], [1, 2, 1]], [[3, 2, 3], [3, 2, 3]]])
    layout, reduced = layout_of_labels(labels)
    assert reduced_shape(layout) == (2, 1, 2)
    assert [axis.index().tolist() for axis in layout] == [[0, 1], [0, 0], [0, 1, 0]]
    assert torch.equal(full(reduced, layout), labels)


@pytest.mark.parametrize("seed", range(5))
def test_any_tensor_is_read_again_from_its_layout(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (3, 4, 2), generator=generator)
    layout, reduced = layout_of_labels(labels)
    assert torch.equal(full(reduced, layout), labels)
    index = full_labels(layout)
    assert torch.equal(reduced.flatten()[index], labels)
    assert torch.equal(full_labels(layout, 7), index + 7)


def test_joined_layouts_tell_apart_what_either_does() -> None:
    joined = join([(PAIRS,), (HALVES,)], (4,))
    assert joined == (explicit(4),)
    assert join([(PAIRS,), (collapsed(4),)], (4,)) == (PAIRS,)
    assert join([(PAIRS,)], (2, 4)) == (collapsed(2), PAIRS)
    assert broadcast((explicit(1), PAIRS), (3, 4)) == (collapsed(3), PAIRS)


@pytest.mark.parametrize("old", [(collapsed(4),), (PAIRS,), (HALVES,), (explicit(4),)])
@pytest.mark.parametrize("other", [(collapsed(4),), (PAIRS,), (HALVES,), (explicit(4),)])
def test_a_finer_layout_reads_the_same_tensor(old: Layout, other: Layout) -> None:
    new = join([old, other], (2, 4))
    x = torch.rand(reduced_shape(old))
    read = reader(old, new)(x)
    assert read.shape == reduced_shape(new)
    assert torch.equal(full(read, new), full(x, old).expand(2, 4))
