"""Real data from files in their true formats, written here in small; batches with every class."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import fxprune.data
from fxprune.data import (
    balanced,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    image_folder,
    labelled_images,
    load,
    tiny_imagenet,
)

NOISE = np.random.default_rng(0)


def pixels(number: int) -> Any:
    """Rows of 3072 bytes: 1024 red, 1024 green, 1024 blue, row by row, as CIFAR has them."""
    return NOISE.integers(0, 256, (number, 3072), dtype=np.uint8)


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=2))


def test_cifar10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    data = pixels(4)
    for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
        dump(folder / name, {"batch_label": name, "data": data, "labels": [3, 1, 4, 1], "filenames": []})
    dump(folder / "batches.meta", {"label_names": [f"name{index}" for index in range(10)]})
    train, test = cifar10(tmp_path, check=False)
    assert (len(train), len(test)) == (20, 4)  # type: ignore[arg-type]
    x, y = test[2]
    assert (x.shape, y) == ((3, 32, 32), 4)
    wanted = torch.from_numpy(data[2].reshape(3, 32, 32)) / 255
    mean, deviation = torch.tensor(fxprune.data._CIFAR10)[..., None, None]
    assert torch.allclose(x, (wanted - mean) / deviation, atol=1e-6)
    torch.manual_seed(0)
    assert not torch.equal(train[0][0], train[0][0]), "augmented"
    plain, _ = cifar10(tmp_path, check=False, augment=False)
    assert torch.equal(plain[2][0], x)
    assert sorted(next(iter(balanced(plain, 5)))[1].tolist()) == [1] * 5 + [3] * 5 + [4] * 5
    with pytest.raises(FileNotFoundError, match="not as published"):
        cifar10(tmp_path)


def test_cifar100(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    for name, number in (("train", 5), ("test", 2)):
        dump(folder / name, {"data": pixels(number), "fine_labels": [99, 0, 7, 8, 9][:number],
                             "coarse_labels": [0] * number, "filenames": []})  # fmt: skip
    dump(folder / "meta", {"fine_label_names": ["a"] * 100, "coarse_label_names": ["b"] * 20})
    train, test = cifar100(tmp_path, check=False)
    assert (len(train), len(test), train[0][1]) == (5, 2, 99)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="cifar-100-python"):
        cifar100(tmp_path / "elsewhere", check=False)


def image(path: Path, size: int = 64, mode: str = "RGB", value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, 0)).save(path, "JPEG")


def test_tiny_imagenet(tmp_path: Path) -> None:
    for index, name in enumerate(("n01443537", "n01629819")):
        for number in range(2):
            image(tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG", value=100 * index)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    image(tmp_path / "val" / "images" / "val_0.JPEG", value=100)
    image(tmp_path / "val" / "images" / "val_1.JPEG", mode="L")
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("val_0.JPEG\tn01629819\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n")
    train, test = tiny_imagenet(tmp_path)
    assert (len(train), len(test)) == (4, 2)  # type: ignore[arg-type]
    assert [y for _, y in train] == [0, 0, 1, 1]
    assert [y for _, y in test] == [1, 0]  # type: ignore[attr-defined]
    assert all(x.shape == (3, 64, 64) for x, _ in [train[0], test[0], test[1]])
    red = (test[0][0][0].mean() * 0.229 + 0.485) * 255
    assert float(red) == pytest.approx(100, abs=3)
    table.write_text("val_0.JPEG\tn999\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match="'n999'"):
        tiny_imagenet(tmp_path)
    table.unlink()
    with pytest.raises(FileNotFoundError, match="val_annotations"):
        tiny_imagenet(tmp_path)


def test_image_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            image(tmp_path / split / name / "1.jpg", size=40)
    train, test = image_folder(tmp_path, size=28)
    assert (train[0][0].shape, test[1][0].shape, test[1][1]) == ((3, 28, 28), (3, 28, 28), 1)
    image(tmp_path / "val" / "emu" / "1.jpg")
    with pytest.raises(ValueError, match="class 'emu'"):
        image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        image_folder(tmp_path / "nowhere")


def idx(path: Path, numbers: torch.Tensor) -> None:
    """Write a file as Fashion-MNIST has it: a type, the sizes, and bytes."""
    head = bytes([0, 0, 8, numbers.dim()]) + b"".join(size.to_bytes(4, "big") for size in numbers.shape)
    content = head + bytes(numbers.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path: Path, suffix: str, inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    for part, number in (("train", 3), ("t10k", 2)):
        idx(
            folder / f"{part}-images-idx3-ubyte{suffix}",
            torch.arange(number * 784).view(number, 28, 28) % 256,
        )
        idx(folder / f"{part}-labels-idx1-ubyte{suffix}", torch.arange(number))
    train, test = load("fashion-mnist", str(tmp_path))
    assert (len(train), len(test)) == (3, 2)  # type: ignore[arg-type]
    x, y = train[1]
    assert x.shape == (1, 28, 28)
    assert x[0, 0, 0] == pytest.approx((784 % 256 / 255 - 0.2860) / 0.3530)
    assert y == 1
    assert fashion_mnist(tmp_path, channels=3)[0][0][0].shape == (3, 28, 28)
    (folder / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte: not there"):
        fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="channels=0"):
        fashion_mnist(tmp_path, channels=0)


def test_digits() -> None:
    train, test = digits(size=12, channels=3, held_out=100)
    x, y = train.tensors
    assert (x.shape, len(test)) == ((1697, 3, 12, 12), 100)
    assert torch.equal(x[:, 0], x[:, 2])
    assert x.min() >= -0.5
    assert x.max() <= 0.5
    assert sorted(set(y.tolist())) == list(range(10))
    for change in ({"size": 0}, {"channels": 0}, {"held_out": 0}, {"held_out": 1797}):
        with pytest.raises(ValueError, match=next(iter(change))):
            digits(**change)


def test_by_name(tmp_path: Path) -> None:
    assert len(load("digits")[0]) == 1437  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data='mnist'"):
        load("mnist")
    with pytest.raises(FileNotFoundError):
        load("cifar10", str(tmp_path))


# ---------------------------------------------------------------- equally many samples of every class
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


def test_images_in_grey(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (30, 30), (255, 0, 0)).save(tmp_path / "cat" / "a.png")
    x, label = labelled_images(tmp_path, size=8, channels=1)[0]
    assert x.shape == (1, 8, 8)
    assert label == 0
    assert x.flatten().tolist() == pytest.approx([(76 / 255 - 0.449) / 0.226] * 64, abs=1e-5)
    with pytest.raises(ValueError, match=r"^channels=4: images of files have 1 \(grey\) or 3$"):
        labelled_images(tmp_path, channels=4)
