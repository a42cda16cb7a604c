"""Write networks, masks and tickets to safetensors files, and read the masks in them."""

from __future__ import annotations

import json
import os
from typing import Literal, NoReturn, get_args

import torch
from torch import nn

from fxprune.capture.errors import check_module
from fxprune.keywords import nearest, refuse_unknown
from fxprune.rewrite.files.container import FORMAT, read_container, write_container
from fxprune.rewrite.files.network import NETWORK_VERSION, is_network, network_file
from fxprune.rewrite.files.packing import pack, unpack
from fxprune.rewrite.files.tensors import decode_tensors
from fxprune.rewrite.files.tickets import CENTROIDS, SIGNS, ticket_tensors, unpack_ticket
from fxprune.rewrite.masking.parameters import masked_places, read, unwrap
from fxprune.sparsity.masks import Masks, total
from fxprune.whole_files import check_file_name

Form = Literal["dense", "sparse", "masks", "ticket"]
FORMS: tuple[Form, ...] = get_args(Form)
MASKS_VERSION = "1"


def stamp(model: nn.Module, **facts: object) -> None:
    """Notes on the masked modules of ``model`` where their masks come from (method, sparsity, seed, ...).

    A graph module loses its own attributes when copied and its ``meta`` when pickled; its masked submodules
    keep theirs, so that :func:`save` finds the note after either.
    """
    for _, module, _ in masked_places(unwrap(model)):
        module.__dict__["mask_provenance"] = {key: str(value) for key, value in facts.items()}


def provenance(model: nn.Module) -> dict[str, str]:
    """Return what :func:`stamp` noted; empty if nothing did."""
    for module in unwrap(model).modules():
        if "mask_provenance" in module.__dict__:
            return dict(module.__dict__["mask_provenance"])
    return {}


def save(
    network: nn.Module,
    path: str | os.PathLike[str],
    *,
    form: Form | None = None,
    **facts: object,
) -> None:
    """Write a network to a safetensors file: masked, compact or plain, for :func:`fxprune.load`.

    Parameter names are those of the original. The file is complete or as it was before. ``save(path,
    network)`` works as well.

    Args:
        network: a masked, compact or plain network. Of one that ``fully_shard`` has split, only masks (by one
            process) and tickets (by all processes) can be written.
        path: the file to write.
        form: "dense": every tensor whole. "sparse": what is zero takes one bit, what is not its value
            besides; the default for masked networks, others are dense. "masks": one bit per weight, for
            :func:`fxprune.load_masks`. "ticket": masks, the means of each layer's negative and positive
            weights, and signs, for :func:`fxprune.load_ticket`.
        facts: entries for the header, over those that the network remembers (method, sparsity, seed). None
            may be called nearly like ``form``.

    Raises:
        TypeError: there is no network, or a fact that may be a misspelt ``form``.
        ValueError: there is no such form, no mask to write, or the network could not be loaded again; the
            message says why.

    >>> import tempfile
    >>> from fxprune.rewrite import install
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(layer, f"{folder}/layer.safetensors", method="random")
    ...     load_masks(f"{folder}/layer.safetensors")
    {'weight': tensor([[ True, False]])}
    """
    if isinstance(path, nn.Module) and not isinstance(network, nn.Module):
        network, path = path, network
    check_module(network, "network")
    check_file_name(path)
    refuse_unknown(save, {name: 0 for name in facts if nearest(name, ["form"])})
    if form not in (None, *FORMS):
        raise ValueError(f"form={form!r}: expected one of {', '.join(map(repr, FORMS))}")
    masks = read(network)
    if form in ("masks", "ticket"):
        if not masks:
            raise ValueError(f"network: it has no masks to save as form={form!r}; set masks first")
        tensors = {name: pack(mask) for name, mask in masks.items()}
        header = {"format_version": MASKS_VERSION}
        header["shapes"] = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
        if form == "ticket":
            tensors |= ticket_tensors(network)
    else:
        form = form or ("sparse" if masks else "dense")
        tensors, header = network_file(network, sparse=form == "sparse")
        header["format_version"] = NETWORK_VERSION
    noted = {**_numbers(masks), **provenance(network), **{key: str(value) for key, value in facts.items()}}
    write_container(tensors, path, {**noted, **header, "format": FORMAT, "form": form})


def _numbers(masks: Masks) -> dict[str, str]:
    """The counts of a masked network for a header."""
    size, alive = sum(mask.numel() for mask in masks.values()), total(masks)
    known = {"method": "unknown", "seed": "unknown"}
    if not masks:
        return known
    return {**known, "sparsity": repr(1 - alive / size), "kept": str(alive), "total": str(size)}


def load_masks(path: str | os.PathLike[str], **others: NoReturn) -> Masks:
    """The masks in a file that :func:`save` wrote, in either form, on the CPU.

    Args:
        path: the file.

    Returns:
        Parameter name -> bool tensor, ``True`` = kept; for :func:`fxprune.set_masks`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours, of a newer format, or damaged; the message names it.
    """
    refuse_unknown(load_masks, others)
    return _masks(path, *read_container(path, "mask"))


def read_ticket(
    path: str | os.PathLike[str],
) -> tuple[Masks, dict[str, tuple[float, float]], dict[str, torch.Tensor]]:
    """Masks, centroids (negative, positive) and signs (True = negative) of a ticket, by parameter name.

    Raises ``FileNotFoundError`` and ``ValueError`` as :func:`load_masks`, the latter also for a file that has
    masks only.
    """
    header, tensors = read_container(path, "mask")
    masks = _masks(path, header, tensors)
    if header.get("form") != "ticket":
        raise ValueError(f"{os.fspath(path)}: a file of masks, not a ticket; save with form='ticket'")
    return masks, *unpack_ticket(masks, tensors, path)


def _masks(path: str | os.PathLike[str], header: dict[str, str], tensors: dict[str, torch.Tensor]) -> Masks:
    if header.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)}: not an fxprune mask file, expected one that fxprune.save wrote")
    try:
        if is_network(header):
            return decode_tensors(tensors, json.loads(header["manifest"])["layout"])[1]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged file of masks ({error})") from error
    if header.get("format_version") != MASKS_VERSION:
        raise ValueError(
            f"{os.fspath(path)}: mask format {header.get('format_version')!r}, this fxprune reads"
            f" {MASKS_VERSION}; use the fxprune that wrote it ({header.get('fxprune')})"
        )
    try:
        shapes = {name: torch.Size(shape) for name, shape in json.loads(header["shapes"]).items()}
        if shapes.keys() != tensors.keys() - {CENTROIDS, SIGNS}:
            raise ValueError("the names in the header are not those of the tensors")
        return {name: unpack(tensors[name], shape) for name, shape in shapes.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged mask file ({error})") from error


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the header of a file that :func:`save` wrote: form, method, sparsity, seed, versions."""
    return read_container(path, "fxprune")[0]
