"""Mask files: a masked model comes in, a safetensors file goes out, one bit per weight; and back again."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fxprune.rewrite.form import form_of
from fxprune.rewrite.names import read, unwrap
from fxprune.sparsity.masks import Masks, total

FORMAT = "fxprune"
FORMAT_VERSION = 1
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def stamp(model: nn.Module, **facts: object) -> None:
    """Notes on the masked modules of ``model`` where their masks come from (method, sparsity, seed, ...).

    A graph module loses its own attributes when copied and its ``meta`` when pickled; its masked submodules
    keep theirs, so that :func:`save` finds the note after either.
    """
    for module in unwrap(model).modules():
        if form_of(module) is not None:
            module.__dict__["mask_provenance"] = {key: str(value) for key, value in facts.items()}


def provenance(model: nn.Module) -> dict[str, str]:
    """What :func:`stamp` noted; empty if nothing did."""
    for module in unwrap(model).modules():
        if "mask_provenance" in module.__dict__:
            return dict(module.__dict__["mask_provenance"])
    return {}


def save(gm: nn.Module, path: str | os.PathLike[str], **facts: object) -> None:
    """Writes the masks of a model to a safetensors file.

    Each mask takes an eighth of a byte per weight. The header says ``format``, ``format_version``,
    ``method``, ``sparsity`` (asked for, if known, else obtained), ``kept`` and ``total`` (weights), ``seed``,
    ``torch``, ``fxprune`` and the ``shapes``.

    Args:
        gm: a masked graph module or plain module.
        path: the file to write.
        facts: entries for the header, over those that the model remembers.

    Raises:
        ValueError: the model has no masks.

    >>> import tempfile
    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(layer, f"{folder}/masks.safetensors", method="random")
    ...     load_masks(f"{folder}/masks.safetensors")
    {'weight': tensor([[ True, False]])}
    """
    masks = read(gm)
    if not masks:
        raise ValueError("gm: it has no masks to save; set masks first")
    size, alive = sum(mask.numel() for mask in masks.values()), total(masks)
    header = {
        "method": "unknown",
        "sparsity": repr(1 - alive / size),
        "seed": "unknown",
        **provenance(gm),
        **{key: str(value) for key, value in facts.items()},
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kept": str(alive),
        "total": str(size),
        "torch": torch.__version__,
        "fxprune": _own_version(),
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
    }
    save_file({name: pack(mask) for name, mask in masks.items()}, path, metadata=header)


def load_masks(path: str | os.PathLike[str]) -> Masks:
    """The masks in a file that :func:`save` wrote, on the CPU.

    Args:
        path: the file.

    Returns:
        Parameter name -> bool tensor, ``True`` = kept; for :func:`fxprune.set_masks`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours, of a newer format, or damaged; the message names it.
    """
    header, tensors = _open(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)}: not an fxprune mask file, expected one that fxprune.save wrote")
    if header.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{os.fspath(path)}: mask format {header.get('format_version')!r}, this fxprune reads"
            f" {FORMAT_VERSION}; use the fxprune that wrote it ({header.get('fxprune')})"
        )
    try:
        shapes = {name: torch.Size(shape) for name, shape in json.loads(header["shapes"]).items()}
        if shapes.keys() != tensors.keys():
            raise ValueError("the names in the header are not those of the tensors")
        return {name: unpack(tensors[name], shape) for name, shape in shapes.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged mask file ({error})") from error


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header of a mask file: method, sparsity, seed, versions."""
    return _open(path)[0]


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such mask file")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: not a readable mask file ({error})") from error


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bytes: entry i, in row-major order, is bit i % 8 of byte i // 8.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded * torch.tensor(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of :func:`pack`.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), torch.Size([3]))
    tensor([ True, False,  True])
    """
    size = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
        raise ValueError(f"{tuple(packed.shape)} bytes for a mask of shape {tuple(shape)}")
    bits = packed.unsqueeze(1).bitwise_and(torch.tensor(_BITS, dtype=torch.uint8)) != 0
    if bits.flatten()[size:].any():
        raise ValueError("bits are set beyond the end of a mask")
    return bits.flatten()[:size].reshape(shape).clone()


def _own_version() -> str:
    try:
        return version("fxprune")
    except PackageNotFoundError:
        return "unknown"
