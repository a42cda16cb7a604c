"""The order in which groups go under a number for every layer."""

from __future__ import annotations

import torch

from fxprune.sparsity.group_order import by_class


def test_the_lowest_of_every_class_go_first_and_classes_go_in_proportion() -> None:
    score = torch.tensor([3.0, 1.0, 2.0, 0.5, 70.0, 60.0, 80.0, 50.0], dtype=torch.float64)
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    everything = torch.ones(8, dtype=torch.bool)
    order = by_class(score, classes, {0: 1.0, 1: 1.0}, everything).tolist()
    assert [place for place in order if place < 4] == [3, 1, 2, 0]
    assert [place for place in order if place >= 4] == [7, 5, 4, 6]
    assert [sum(place < 4 for place in order[:gone]) for gone in (2, 4, 6, 8)] == [1, 2, 3, 4]
    # A class that keeps half of what another keeps loses its groups earlier.
    order = by_class(score, classes, {0: 1.0, 1: 0.5}, everything).tolist()
    assert sum(place >= 4 for place in order[:3]) > sum(place < 4 for place in order[:3])
    assert set(by_class(score, classes, {}, score > 2).tolist()) == {0, 4, 5, 6, 7}
