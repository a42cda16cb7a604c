"""Write tensors and a header to a safetensors file, in full or not at all, and read them back checked."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors import SafetensorError, safe_open

from fxprune.tensor_files import save_tensors
from fxprune.whole_files import check_file_name, whole_file

__all__ = ["CHECKSUM", "FORMAT", "own_version", "read_container", "write_container"]

FORMAT = "fxprune"
CHECKSUM = "checksum"


def write_container(
    tensors: dict[str, torch.Tensor], path: str | os.PathLike[str], header: dict[str, str]
) -> None:
    """Write a file; what was there before stays until the new one is complete, or for good if that fails.

    Processes that write the same file do not write into each other's: the last one's is left.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**header, "torch": torch.__version__, "fxprune": own_version()}
    sealed[CHECKSUM] = checksum(plain, sealed)
    with whole_file(path) as part:
        save_tensors(plain, part, sealed)


def read_container(path: str | os.PathLike[str], what: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return header and tensors of a file.

    Raises:
        FileNotFoundError: there is none; ``what`` says of which kind.
        ValueError: it is not readable, or its contents are not those that were written.
    """
    check_file_name(path)
    name = os.fspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name}: this is a folder; expected a {what} file in it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: no such {what} file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        if zipfile.is_zipfile(path):
            raise ValueError(
                f"{name}: a file of torch.save, expected a {what} file of fxprune.save; torch.load reads it,"
                " and load_state_dict takes its tensors"
            ) from error
        raise ValueError(f"{name}: not a readable {what} file, or a damaged one ({error})") from error
    if CHECKSUM in header and header[CHECKSUM] != checksum(tensors, header):
        raise ValueError(f"{name}: damaged {what} file (its contents are not those that were written)")
    return header, tensors


def checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """The CRC-32 of a header and of all tensors, in eight hexadecimal digits."""
    head = {key: value for key, value in sorted(header.items()) if key != CHECKSUM}
    value = zlib.crc32(json.dumps(head).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def own_version() -> str:
    """The version of this package; "unknown" where it is not installed."""
    try:
        return version("fxprune")
    except PackageNotFoundError:
        return "unknown"
