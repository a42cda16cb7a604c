"""Equally many samples of every class."""

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from fxprune.data import balanced

X = torch.arange(60.0).view(30, 2)
Y = torch.tensor([0] * 17 + [1] * 5 + [7] * 8)


class Images(Dataset[Any]):
    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        return X[index], int(Y[index])


class Labelled(Images):
    def __init__(self) -> None:
        super().__init__()
        self.targets = Y.tolist()


@pytest.mark.parametrize("dataset", [(X, Y), Images(), Labelled()])
def test_every_class_equally_often_in_every_batch(dataset: Any) -> None:
    batches = list(balanced(dataset, 4, batch_size=6))
    assert [sorted(y.tolist()) for _, y in batches] == [[0, 0, 1, 1, 7, 7]] * 2
    for x, y in batches:
        rows = (x[:, 0] / 2).long()
        assert torch.equal(Y[rows], y)
    assert len({float(value) for x, _ in batches for value in x[:, 0]}) == 12


def test_one_batch_by_default_and_the_same_each_time() -> None:
    loader = balanced((X, Y), 5)
    first, again = next(iter(loader)), next(iter(loader))
    assert torch.equal(first[0], again[0])
    assert len(first[1]) == 15
    assert torch.equal(first[0], next(iter(balanced((X, Y), 5)))[0])
    assert not torch.equal(first[0], next(iter(balanced((X, Y), 5, seed=1)))[0])


def test_classes_are_not_sorted() -> None:
    labels = next(iter(balanced((X, Y), 5)))[1]
    assert not torch.equal(labels, labels.sort().values)


def test_known_labels_spare_the_reading() -> None:
    dataset = Labelled()
    loader = balanced(dataset, 2)
    assert dataset.read == 0
    assert len(next(iter(loader))[1]) == 6
    assert dataset.read == 6


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        ((X, Y), {"per_class": 6}, "per_class=6: class 1 has only 5 samples"),
        ((X, Y), {"per_class": 0}, "per_class=0: expected an integer of at least 1"),
        ((X, Y), {"batch_size": 0}, "batch_size=0"),
        ((X, Y.float()), {}, r"type torch.float32 for 30 samples: expected one integer each"),
        ((X, Y), {"labels": [0, 1]}, r"labels of shape \(2,\)"),
        ((X[:0], Y[:0]), {}, "for 0 samples"),
    ],
)
def test_errors(dataset: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        balanced(dataset, **options)
