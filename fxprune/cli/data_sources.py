"""Data by name, sized for a network: a data set that is known, a folder of images, or a factory in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import fxprune
from fxprune.cli.hugging_face import folder_of, load_calibration
from fxprune.cli.sources import load_factory

if TYPE_CHECKING:
    from torch import nn

NAMES = ("cifar10", "cifar100", "digits", "fashion-mnist", "image-folder", "tiny-imagenet")
"""The data sets that ``fxprune.data`` knows by name."""

EXPECTED = f"{', '.join(NAMES)}, a folder with a folder of images for each class, or path/to/file.py:factory"


def load_batches(
    model: str, network: nn.Module, inputs: Any, seed: int, *, data: str | None, root: str, batch_size: int
) -> Any:
    """Return batches of the data that ``data`` names, as ``network`` takes them; None where it is None.

    Args:
        data: one of ``NAMES``, a folder with one folder of images for each class (those in its folder
            ``train``, if there is one), or a factory of (x, y) or of batches, whose result is returned as it
            is.
        model: the name of the network; for ``hf:FOLDER`` data may be a file of text or arrays.
        network: its image size, and its number of channels, are those of the data.
        inputs: its example inputs, None where it says them itself.
        seed: decides the order of the samples, the same for any number of passes.
        root: the folder in which data sets lie that are known by name.
        batch_size: samples in a batch.

    Raises ``ValueError`` for a name that is none, ``FileNotFoundError`` where the files are not there.
    """
    if data is None:
        return None
    if ".py:" in data:
        return load_factory(data)()
    if folder_of(model) is not None:
        return load_calibration(Path(data), model, network)
    channels, size = _image(network, inputs, data)
    samples = load_samples(data, root, channels, size)
    import torch
    from torch.utils.data import DataLoader

    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return DataLoader(torch.utils.data.Subset(samples, order), batch_size)


def load_samples(source: str, root: str, channels: int, size: int) -> Any:
    """Return the training samples of a data set or a folder, as images of (channels, size, size)."""
    if source == "digits":
        return fxprune.data.digits(size=size, channels=channels)[0]
    if source == "fashion-mnist":
        return fxprune.data.fashion_mnist(root, size=size, channels=channels)[0]
    if source == "image-folder":
        return fxprune.data.image_folder(root, size=size, augment=False)[0]
    if source in NAMES:
        return getattr(fxprune.data, source.replace("-", "_"))(root, augment=False)[0]
    path = Path(source)
    if not path.is_dir():
        raise ValueError(f"--data {source}: expected {EXPECTED}")
    if channels not in (1, 3):
        raise ValueError(
            f"--data {source}: the network takes {channels} channels, and images have 1 or 3; use a factory"
        )
    inner = path / "train" if (path / "train").is_dir() else path
    return fxprune.data.labelled_images(inner, size=size, channels=channels)


def _image(network: nn.Module, inputs: Any, source: str) -> tuple[int, int]:
    """Channels and size of the one image that a network takes."""
    import torch

    from fxprune.capture.inputs import example_inputs_for

    args, kwargs = example_inputs_for(network, inputs)
    known = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if len(known) != 1 or known[0].dim() != 4 or known[0].shape[2] != known[0].shape[3]:
        shapes = ", ".join(str(tuple(value.shape)) for value in known)
        raise ValueError(f"--data {source}: the network takes {shapes}, not square images; use a factory")
    return known[0].shape[1], known[0].shape[2]
