"""Labels that are tied and fixed, and factors of tensors of labels."""

from __future__ import annotations

import torch

from fxprune.channels.labels import FILLED, FIRST, FIXED, Factor, Labels, aligned, thin


def labels_of(count: int) -> Labels:
    return Labels(count=FIRST + count)


def test_ties_reach_from_one_to_the_next() -> None:
    labels = labels_of(5)
    labels.tie(torch.tensor([2, 3]), torch.tensor([3, 4]))
    assert labels.root[FIRST:].tolist() == [2, 2, 2, 5, 6]
    labels.tie(torch.tensor([6]), torch.tensor([5]))
    assert labels.root[FIRST:].tolist() == [2, 2, 2, 5, 5]


def test_entries_that_were_filled_in_tie_nothing() -> None:
    labels = labels_of(3)
    labels.tie(torch.tensor([FILLED, 3]), torch.tensor([2, FILLED]))
    assert labels.root[FIRST:].tolist() == [2, 3, 4]


def test_one_label_is_tied_to_all_that_it_is_broadcast_over() -> None:
    labels = labels_of(4)
    labels.tie(torch.tensor([[2], [3]]), torch.tensor([[4, 5], [4, 4]]))
    assert labels.root[FIRST:].tolist() == [2, 2, 2, 2]


def test_what_is_tied_to_something_fixed_is_fixed_and_the_first_reason_stays() -> None:
    labels = labels_of(3)
    labels.tie(torch.tensor([2]), torch.tensor([3]))
    labels.fix(torch.tensor([3]), "an output")
    labels.fix(torch.tensor([3, 4, FILLED]), "another")
    assert labels.root[FIRST:].tolist() == [FIXED] * 3
    assert labels.reasons == {3: "an output", 4: "another"}


def test_thin_keeps_the_axes_along_which_labels_differ() -> None:
    rows = torch.tensor([2, 3])[:, None].expand(2, 3)
    found = thin(rows)
    assert found is not None
    assert found == Factor((0,), torch.tensor([[2], [3]]))
    padded = torch.nn.functional.pad(rows, (1, 1), value=FILLED)
    assert thin(padded) == found, "zeros around an image tell nothing apart"
    both = thin(torch.tensor([[2, 3], [3, 2]]))
    assert both is not None
    assert both.axes == (0, 1)
    assert thin(torch.full((2, 3), 2)) is None
    assert thin(torch.full((2, 3), FILLED)) is None


def test_factors_are_aligned_from_the_last_axis_on() -> None:
    factor = Factor((1,), torch.tensor([[2, 3]]))
    (moved,) = aligned([factor], 2, 4)
    assert (moved.axes, moved.labels.shape) == ((3,), (1, 1, 1, 2))
    assert aligned([factor], 2, 2) == [factor]
