"""Write the folder of ``prune --out``, and read it back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fxprune
from fxprune.cli.sources import load_network

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "COMPACT",
    "MASKED",
    "REPORT",
    "check_can_be_made",
    "check_export",
    "check_folder",
    "dense_bytes",
    "read_file",
    "read_folder",
    "write_networks",
]

MASKED, COMPACT, REPORT = "model.safetensors", "compact.safetensors", "report.json"
_OLD_MASKS = "masks.safetensors"


def check_export(path: Path, flag: str = "--export") -> None:
    """Refuse a file that could not be exported to, before any work is done."""
    fxprune.rewrite.check_path(path)
    check_folder(flag, path)


def check_folder(flag: str, path: Path | None) -> None:
    """Refuse a file that ``flag`` names in a folder that is not there, before any work is done."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path is not None and path.is_dir():
        raise ValueError(f"{flag} {path}: this is a folder; expected the name of a file")


def check_can_be_made(folder: Path) -> None:
    """``OSError`` that names a folder that cannot be made; one that is not there yet is not there after."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "it is read-only")
    except OSError as error:
        raise type(error)(f"--out {folder}: nothing can be written there ({error.strerror})") from error
    finally:
        for one in missing:
            if one.is_dir():
                one.rmdir()


def write_networks(
    folder: Path, masked: nn.Module, compact: nn.Module | None, facts: dict[str, Any]
) -> dict[str, int]:
    """Write the masked network and, if there is one, the compact one; return bytes by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    fxprune.save(masked, folder / MASKED, **facts)
    if compact is not None:
        fxprune.save(compact, folder / COMPACT, **facts)
    names = [MASKED] if compact is None else [MASKED, COMPACT]
    return {name: (folder / name).stat().st_size for name in names}


def read_folder(folder: Path) -> tuple[dict[str, nn.Module], Any, dict[str, Any]]:
    """Return the networks of a folder ("dense", "masked", perhaps "compact"), their inputs, and its facts.

    The dense one has the weights that the model begins with under the seed of the folder.
    """
    file = folder / (_OLD_MASKS if (folder / _OLD_MASKS).is_file() else MASKED)
    dense, inputs, facts = _dense(file)
    networks = {"dense": dense}
    if file.name == _OLD_MASKS:
        networks["masked"] = fxprune.capture(dense, inputs)
        fxprune.set_masks(networks["masked"], fxprune.load_masks(file))
    else:
        networks["masked"] = fxprune.load(file, dense)
    if (folder / COMPACT).is_file():
        networks["compact"] = fxprune.load(folder / COMPACT, dense)
    return networks, inputs, {key: facts[key] for key in ("model", "method", "seed")}


def read_file(file: Path) -> tuple[nn.Module, Any]:
    """Return the network of one file of a folder, and its inputs."""
    dense, inputs, _ = _dense(file)
    return fxprune.load(file, dense), inputs


def _dense(file: Path) -> tuple[nn.Module, Any, dict[str, str]]:
    """Return the network that a file was made of, its inputs, and what the file says of it."""
    folder = file.parent
    facts = fxprune.rewrite.read_header(file)
    if "model" not in facts:
        own = (folder / "config.json").is_file()
        other = f"of transformers it is hf:{folder}" if own else "expected a folder of prune --out"
        raise ValueError(f"{file}: does not say of which model; {other}")
    dense, inputs = load_network(
        facts["model"],
        int(facts["seed"]),
        pretrained=facts.get("pretrained") == "True",
        num_classes=int(facts["num_classes"]) if "num_classes" in facts else None,
        weights=facts.get("weights"),
    )
    return dense, inputs, facts


def dense_bytes(network: nn.Module) -> int:
    """The bytes of a network's weights and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
