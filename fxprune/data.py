"""Data: real data sets from their files, and samples for scoring, equally many of every class.

Some methods (GraSP, PX) ask for the latter; what ``balanced`` makes can be passed as ``data=`` to any.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset


def balanced(
    dataset: Dataset[Any] | tuple[torch.Tensor, torch.Tensor],
    per_class: int = 10,
    *,
    batch_size: int | None = None,
    labels: Sequence[int] | torch.Tensor | None = None,
    seed: int = 0,
) -> DataLoader[Any]:
    """A loader over ``per_class`` random samples of every class, the same in the same order each time.

    Args:
        dataset: a data set of pairs (x, label) with a length, or a pair of tensors.
        per_class: number of samples of each class that occurs.
        batch_size: samples per batch; ``None`` puts all in one. Classes take turns, so that every batch of a
            multiple of their number is balanced too.
        labels: the labels of all samples. Where missing, ``dataset.targets`` is taken if it is there; if
            not, every sample is read once.
        seed: decides which samples and in which order.

    Raises:
        ValueError: an empty data set, a class with too few samples, labels that are not one integer per
            sample, numbers below 1.

    >>> x, y = torch.arange(6.0).view(6, 1), torch.tensor([0, 0, 1, 1, 1, 0])
    >>> [sorted(labels.tolist()) for _, labels in balanced((x, y), 2, batch_size=2)]
    [[0, 1], [0, 1]]
    """
    for argument, number in (("per_class", per_class), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{argument}={number!r}: expected an integer of at least 1")
    samples = TensorDataset(*dataset) if isinstance(dataset, tuple) else dataset
    known = _labels(samples, labels)
    generator = torch.Generator().manual_seed(seed)
    chosen = [_some_of(known, label, per_class, generator) for label in sorted(set(known.tolist()))]
    rounds = torch.stack(chosen, dim=1)
    turns = [one[torch.randperm(len(one), generator=generator)] for one in rounds]
    order = torch.cat(turns).tolist()
    return DataLoader(Subset(samples, order), batch_size=batch_size or len(order))


def _labels(dataset: Dataset[Any], labels: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    size = len(dataset)  # type: ignore[arg-type]
    given = getattr(dataset, "targets", None) if labels is None else labels
    if given is None and isinstance(dataset, TensorDataset):
        given = dataset.tensors[1]
    if given is None:
        given = [dataset[index][1] for index in range(size)]
    found = torch.as_tensor(given)
    if found.is_floating_point() or found.shape != (size,) or not size:
        raise ValueError(
            f"labels of shape {tuple(found.shape)} and type {found.dtype} for {size} samples: expected one "
            "integer each; pass labels=..."
        )
    return found


def _some_of(labels: torch.Tensor, label: int, number: int, generator: torch.Generator) -> torch.Tensor:
    members = (labels == label).nonzero().flatten().cpu()
    if len(members) < number:
        raise ValueError(f"per_class={number}: class {label} has only {len(members)} samples")
    return members[torch.randperm(len(members), generator=generator)[:number]]


Split = tuple[Dataset[Any], Dataset[Any]]


def digits(*, size: int = 8, channels: int = 1, held_out: int = 360) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1797 handwritten digits, for training and for testing; nothing is downloaded.

    Args:
        size: height and width; 8 is their own, others are interpolated.
        channels: the one grey channel is repeated so often.
        held_out: how many, the last, are for testing.

    Returns:
        Two data sets of (x, y): x of shape (channels, size, size) in [-0.5, 0.5], y from 0 to 9.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: numbers below 1, or nothing left to train on.

    >>> train, test = digits(size=16)
    >>> len(train), len(test), train[0][0].shape
    (1437, 360, torch.Size([1, 16, 16]))
    """
    for argument, number in (("size", size), ("channels", channels), ("held_out", held_out)):
        if number < 1:
            raise ValueError(f"{argument}={number!r}: expected an integer of at least 1")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    labels = torch.tensor(found.target)
    if held_out >= len(labels):
        raise ValueError(f"held_out={held_out!r}: expected fewer than there are, {len(labels)}")
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.expand(-1, channels, -1, -1).contiguous()
    return (
        TensorDataset(images[:-held_out], labels[:-held_out]),
        TensorDataset(images[-held_out:], labels[-held_out:]),
    )


# Means and standard deviations of the training images, by channel.
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_GREY = ((0.449,), (0.226,))  # the means of those of ImageNet
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def cifar10(root: str | os.PathLike[str], *, augment: bool = True, check: bool = True) -> Split:
    """CIFAR-10 for training and testing, from ``root/cifar-10-batches-py`` as its authors pack it.

    Args:
        root: the folder with the unpacked archive; nothing is downloaded.
        augment: training images are padded by 4, cropped at random and flipped.
        check: compare the files with the digests of the published ones. They are pickles, which can run
            code: leave this on for files that you did not make.

    Returns:
        Two data sets of (x, y): x of shape (3, 32, 32), normalised by channel.

    Raises:
        FileNotFoundError: the files are not there, or are not the published ones.
    """
    return _cifar("CIFAR10", root, _CIFAR10, augment, check)


def cifar100(root: str | os.PathLike[str], *, augment: bool = True, check: bool = True) -> Split:
    """CIFAR-100 for training and testing, from ``root/cifar-100-python``; otherwise as :func:`cifar10`."""
    return _cifar("CIFAR100", root, _CIFAR100, augment, check)


def _cifar(name: str, root: Any, stats: Any, augment: bool, check: bool) -> Split:
    from torchvision import datasets, transforms

    base = getattr(datasets, name)
    if not check:
        # A digest of None is not looked at; only that the files are there.
        unchecked = {
            "train_list": [[name, None] for name, _ in base.train_list],
            "test_list": [[name, None] for name, _ in base.test_list],
            "meta": {**base.meta, "md5": None},
        }
        base = type(base.__name__, (base,), unchecked)
    plain = _to_tensor(*stats)
    crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
    try:
        train = base(root, train=True, transform=transforms.Compose([*crop, plain]))
        return train, base(root, train=False, transform=plain)
    except RuntimeError as error:
        folder = os.path.join(root, base.base_folder)
        raise FileNotFoundError(
            f"root={os.fspath(root)!r}: {folder} is not there, or not as published"
        ) from error


_FASHION = (0.2860, 0.3530)
_FASHION_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def fashion_mnist(
    root: str | os.PathLike[str], *, size: int = 28, channels: int = 1
) -> tuple[TensorDataset, TensorDataset]:
    """Fashion-MNIST: 60,000 images for training and 10,000 for testing, from its four files in ``root``.

    Args:
        root: the folder with ``train-images-idx3-ubyte`` and the other three, plain or with ``.gz``, or one
            whose ``FashionMNIST/raw`` has them, as torchvision keeps it. Nothing is downloaded; Debian's
            package ``dataset-fashion-mnist`` has them in ``/usr/share/datasets/fashion-mnist``.
        size: height and width; 28 is their own, others are interpolated.
        channels: the one grey channel is repeated so often.

    Returns:
        Two data sets of (x, y): x of shape (channels, size, size), normalised, y from 0 to 9.

    Raises:
        ValueError: numbers below 1.
        FileNotFoundError: a file is not there.
    """
    for argument, number in (("size", size), ("channels", channels)):
        if number < 1:
            raise ValueError(f"{argument}={number!r}: expected an integer of at least 1")
    folder = Path(root) / "FashionMNIST" / "raw"
    folder = folder if folder.is_dir() else Path(root)
    sets = []
    for images, labels in _FASHION_FILES.values():
        x = (_idx(folder / images).unsqueeze(1).float() / 255 - _FASHION[0]) / _FASHION[1]
        if size != x.shape[-1]:
            x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        sets.append(TensorDataset(x.repeat(1, channels, 1, 1), _idx(folder / labels).long()))
    return sets[0], sets[1]


def _idx(path: Path) -> torch.Tensor:
    """The numbers in an idx file, which may be compressed, as torchvision reads them."""
    from torchvision.datasets import mnist

    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        return torch.as_tensor(mnist.read_sn3_pascalvincent_tensor(str(path)))
    if not packed.is_file():
        raise FileNotFoundError(f"{path}: not there; expected the files of Fashion-MNIST, plain or .gz")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name
        plain.write_bytes(gzip.decompress(packed.read_bytes()))
        return torch.as_tensor(mnist.read_sn3_pascalvincent_tensor(str(plain)))


def tiny_imagenet(root: str | os.PathLike[str], *, augment: bool = True) -> Split:
    """Tiny-ImageNet for training and testing (its validation images), from ``root`` as its archive unpacks.

    That is ``train/<class>/images/*.JPEG`` and ``val/images/*.JPEG`` with ``val/val_annotations.txt``, 200
    classes of 64 x 64 pixels. ``augment`` as for :func:`cifar10`. Grey images get three channels.

    Raises:
        FileNotFoundError: a part of it is not there.
        ValueError: an annotation names a class without a folder.
    """
    from torchvision import transforms

    plain = _to_tensor(*_IMAGENET)
    crop = [transforms.RandomCrop(64, padding=4), transforms.RandomHorizontalFlip()] if augment else []
    train = _folder(os.path.join(root, "train"), transforms.Compose([*crop, plain]))
    return train, _Annotated(Path(root) / "val", train.class_to_idx, plain, train.loader)


class _Annotated(Dataset[Any]):
    """The validation images of Tiny-ImageNet: one folder, and a table of file name and class."""

    def __init__(self, folder: Path, classes: dict[str, int], transform: Any, loader: Any) -> None:
        table = folder / "val_annotations.txt"
        if not table.is_file():
            raise FileNotFoundError(f"{table}: not there; expected Tiny-ImageNet as it is published")
        self.transform, self.loader = transform, loader
        self.samples = []
        for line in table.read_text(encoding="utf-8").splitlines():
            name, label = line.split("\t")[:2]
            if label not in classes:
                raise ValueError(
                    f"{table}: {name} is of class {label!r}, for which there is no folder in train/"
                )
            self.samples.append((str(folder / "images" / name), classes[label]))
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(self.loader(path)), label


def image_folder(root: str | os.PathLike[str], *, size: int = 224, augment: bool = True) -> Split:
    """Images in ``root/train/<class>/`` and ``root/val/<class>/`` (ImageNet's layout), to train and test.

    Args:
        root: the folder. Classes are the names of folders, in order of the alphabet.
        size: height and width. Training images are cropped at random to it and flipped under ``augment``, all
            others scaled so that the shorter side is 8/7 of it, and cropped in the middle.

    Raises:
        FileNotFoundError: a folder is not there, or has no images.
        ValueError: the classes of the two differ.
    """
    from torchvision import transforms

    plain = _to_tensor(*_IMAGENET)
    middle = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), plain]
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), plain]
    train = _folder(os.path.join(root, "train"), transforms.Compose(varied if augment else middle))
    test = _folder(os.path.join(root, "val"), transforms.Compose(middle))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ValueError(f"root={os.fspath(root)!r}: class {odd!r} is in only one of train/ and val/")
    return train, test


def labelled_images(root: str | os.PathLike[str], *, size: int = 224, channels: int = 3) -> Dataset[Any]:
    """Images in ``root/<class>/``, for scoring: scaled to 8/7 of ``size``, cropped in the middle, normalised.

    Three channels are red, green and blue; one is grey. Raises ``FileNotFoundError`` where there is no such
    folder, or no image in it, and ``ValueError`` for another number of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels!r}: images of files have 1 (grey) or 3")
    from torchvision import transforms

    grey = [transforms.Grayscale()] if channels == 1 else []
    last = _to_tensor(*(_IMAGENET if channels == 3 else _GREY))
    middle = [*grey, transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), last]
    found: Dataset[Any] = _folder(os.fspath(root), transforms.Compose(middle))
    return found


def _folder(path: str, transform: Any) -> Any:
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: no such folder; expected one folder of images for each class in it")
    from torchvision import datasets

    try:
        return datasets.ImageFolder(path, transform)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: expected a folder of images for each class in it ({error})"
        ) from error


def _to_tensor(mean: tuple[float, ...], deviation: tuple[float, ...]) -> Any:
    from torchvision import transforms

    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, deviation)])


SOURCES: dict[str, Callable[[str], Split]] = {
    "digits": lambda root: digits(),
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    "tiny-imagenet": tiny_imagenet,
    "image-folder": image_folder,
}
"""The data sets by name, as functions of the folder they are in."""


def load(name: str, root: str = "data") -> Split:
    """The data set called ``name``, a key of :data:`SOURCES`, for training and for testing.

    Raises ``ValueError`` for an unknown name, ``FileNotFoundError`` where ``root`` does not have it.

    >>> len(load("digits")[1])
    360
    """
    if name not in SOURCES:
        raise ValueError(f"data={name!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[name](root)
