"""Mask files: a masked model comes in, a safetensors file goes out, one bit per weight; and back again."""

from __future__ import annotations

import json
import os
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fxprune.rewrite.files.packing import pack, unpack
from fxprune.rewrite.files.tickets import CENTROIDS, SIGNS, ticket_tensors, unpack_ticket
from fxprune.rewrite.masking.masked_module import form_of
from fxprune.rewrite.masking.parameters import read, unwrap
from fxprune.sparsity.masks import Masks, total

FORMAT = "fxprune"
FORMAT_VERSION = 1


def stamp(model: nn.Module, **facts: object) -> None:
    """Notes on the masked modules of ``model`` where their masks come from (method, sparsity, seed, ...).

    A graph module loses its own attributes when copied and its ``meta`` when pickled; its masked submodules
    keep theirs, so that :func:`save` finds the note after either.
    """
    for module in unwrap(model).modules():
        if form_of(module) is not None:
            module.__dict__["mask_provenance"] = {key: str(value) for key, value in facts.items()}


def provenance(model: nn.Module) -> dict[str, str]:
    """Return what :func:`stamp` noted; empty if nothing did."""
    for module in unwrap(model).modules():
        if "mask_provenance" in module.__dict__:
            return dict(module.__dict__["mask_provenance"])
    return {}


def save(
    gm: nn.Module,
    path: str | os.PathLike[str],
    *,
    form: Literal["masks", "ticket"] = "masks",
    **facts: object,
) -> None:
    """Writes the masks of a model to a safetensors file, or its ticket.

    Each mask takes an eighth of a byte per weight. A ticket has besides, for each layer, the means of its
    negative and of its positive weights, and one bit for each weight that is kept, its sign: all that
    :func:`fxprune.load_ticket` needs to build the network that ASNI trains anew.

    The header says ``format``, ``format_version``, ``form``, ``method``, ``sparsity`` (asked for, if known,
    else obtained), ``kept`` and ``total`` (weights), ``seed``, ``torch``, ``fxprune`` and the ``shapes``.

    Args:
        gm: a masked graph module or plain module. Where ``fully_shard`` has split it, all processes have to
            call for a ticket, which gathers weights; for masks, one of them is enough.
        path: the file to write.
        form: "masks", or "ticket".
        facts: entries for the header, over those that the model remembers.

    Raises:
        ValueError: the model has no masks, or there is no such form.

    >>> import tempfile
    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(layer, f"{folder}/masks.safetensors", method="random")
    ...     load_masks(f"{folder}/masks.safetensors")
    {'weight': tensor([[ True, False]])}
    """
    if form not in ("masks", "ticket"):
        raise ValueError(f"form={form!r}: expected 'masks' or 'ticket'")
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
        "form": form,
        "kept": str(alive),
        "total": str(size),
        "torch": torch.__version__,
        "fxprune": _own_version(),
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
    }
    tensors = {name: pack(mask) for name, mask in masks.items()}
    if form == "ticket":
        tensors |= ticket_tensors(gm)
    _write(tensors, path, header)


def _write(tensors: dict[str, torch.Tensor], path: str | os.PathLike[str], header: dict[str, str]) -> None:
    """Processes that write the same file do not write into each other's: the last one's is left."""
    part = f"{os.fspath(path)}.{uuid.uuid4().hex}"
    try:
        save_file(tensors, part, metadata=header)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def load_masks(path: str | os.PathLike[str]) -> Masks:
    """The masks in a file that :func:`save` wrote, in either form, on the CPU.

    Args:
        path: the file.

    Returns:
        Parameter name -> bool tensor, ``True`` = kept; for :func:`fxprune.set_masks`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours, of a newer format, or damaged; the message names it.
    """
    return _masks(path, *_open(path))


def read_ticket(
    path: str | os.PathLike[str],
) -> tuple[Masks, dict[str, tuple[float, float]], dict[str, torch.Tensor]]:
    """Masks, centroids (negative, positive) and signs (True = negative) of a ticket, by parameter name.

    Raises ``FileNotFoundError`` and ``ValueError`` as :func:`load_masks`, the latter also for a file that has
    masks only.
    """
    header, tensors = _open(path)
    masks = _masks(path, header, tensors)
    if header.get("form") != "ticket":
        raise ValueError(f"{os.fspath(path)}: a file of masks, not a ticket; save with form='ticket'")
    return masks, *unpack_ticket(masks, tensors, path)


def _masks(path: str | os.PathLike[str], header: dict[str, str], tensors: dict[str, torch.Tensor]) -> Masks:
    if header.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)}: not an fxprune mask file, expected one that fxprune.save wrote")
    if header.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{os.fspath(path)}: mask format {header.get('format_version')!r}, this fxprune reads"
            f" {FORMAT_VERSION}; use the fxprune that wrote it ({header.get('fxprune')})"
        )
    try:
        shapes = {name: torch.Size(shape) for name, shape in json.loads(header["shapes"]).items()}
        if shapes.keys() != tensors.keys() - {CENTROIDS, SIGNS}:
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


def _own_version() -> str:
    try:
        return version("fxprune")
    except PackageNotFoundError:
        return "unknown"
