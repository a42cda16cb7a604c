"""Folders of transformers, ``hf:PATH``: a model with its example inputs and calibration data comes in.

A pruned model goes out as such a folder again, dense in form, with zeros, or compact.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

import fxprune

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

__all__ = ["check_compact", "load_calibration", "load_folder", "token_loss", "write_folder"]

PREFIX = "hf:"
LENGTH = 128
"""Tokens in a row of calibration data, where the model takes as many."""
ROWS = 8
"""Rows of a batch."""
CHANNELS = ("channel", "head")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def folder_of(source: str) -> Path | None:
    """Return the folder that ``hf:PATH`` names; ``None`` for other sources."""
    return Path(source.removeprefix(PREFIX)) if source.startswith(PREFIX) else None


def load_folder(source: str) -> tuple[nn.Module, Any]:
    """Load the model of a folder with its weights, and make example inputs for it.

    Raises ``ValueError`` for a folder that holds no model, or one whose inputs are neither tokens nor images.
    """
    import transformers

    folder = folder_of(source)
    assert folder is not None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source!r}: {folder} has no config.json; expected a folder of transformers")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{source!r}: {folder} has no weights (*.safetensors); save the model there")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = next(iter(config.architectures or ()), "AutoModel")
    kind = getattr(transformers, name, transformers.AutoModel)
    try:
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    except SafetensorError as error:
        raise ValueError(f"{source!r}: its weights cannot be read ({error}); save the model anew") from error
    return model, _example(model, source)


def _example(model: Any, source: str) -> dict[str, Any]:
    import torch

    config, first = model.config, model.main_input_name
    if first == "input_ids":
        text = config.get_text_config()
        return {first: torch.arange(2 * _length(model)).view(2, -1) % int(text.vocab_size)}
    size = getattr(config, "image_size", None)
    if first == "pixel_values" and size:
        height, width = (size, size) if isinstance(size, int) else size
        return {first: torch.zeros(2, int(getattr(config, "num_channels", 3)), height, width)}
    raise ValueError(
        f"{source!r}: the model reads {first!r}, and only tokens and images are made up; give "
        "--data file.npz with an array for every input"
    )


def _length(model: Any) -> int:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", LENGTH)
    return min(LENGTH, int(most))


def load_calibration(path: Path, source: str, model: nn.Module) -> list[Any]:
    """Read calibration data: text that the folder's tokenizer cuts up, or arrays by the name of an input.

    Args:
        path: ``.txt``, ``.npy`` (the model's main input) or ``.npz`` (several inputs, by name).
        source: ``hf:PATH``.
        model: the model of the folder.

    Returns:
        Batches of (inputs by name, tokens), which `token_loss` takes; zeros for models without tokens.

    Raises ``ValueError`` for other files, text without a tokenizer, and less than one row.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"--data {path}: there is no such file")
    if path.suffix == ".txt":
        inputs = {"input_ids": _tokens(path, source, model)}
    elif path.suffix in (".npy", ".npz"):
        inputs = _arrays(path, model)
    else:
        raise ValueError(f"--data {path}: expected .txt, .npy or .npz for {source}, or file.py:factory")
    rows = len(next(iter(inputs.values())))
    parts = [
        {name: values[first : first + ROWS] for name, values in inputs.items()}
        for first in range(0, rows, ROWS)
    ]
    return [(part, part.get("input_ids", torch.zeros(1))) for part in parts]


def token_loss(model: Any) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return a loss of (output, target) for a model of a folder: its class's own, of the tokens that it read.

    Targets with one class for each sample are those of a classifier; it raises ``ValueError`` for others.
    """
    import torch

    def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[:2] == target.shape:
            found: torch.Tensor = model.loss_function(
                logits=logits, labels=target, vocab_size=logits.shape[-1]
            )
            return found
        if isinstance(logits, torch.Tensor) and logits.shape[:1] == target.shape:
            return torch.nn.functional.cross_entropy(logits, target)
        raise ValueError(
            f"--data: it gives no loss for {type(model).__name__}, and the method needs one; take a method"
            " without, such as wanda or sparsegpt, or a factory of (inputs, labels)"
        )

    return loss


def _tokens(path: Path, source: str, model: nn.Module) -> Any:
    import torch
    import transformers

    folder = folder_of(source)
    assert folder is not None
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ValueError(f"--data {path}: {folder} has no tokenizer for text; give arrays of tokens, .npy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = path.read_text(encoding="utf-8", errors="replace")
    words = torch.tensor(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    length = _length(model)
    if len(words) < length:
        raise ValueError(f"--data {path}: {len(words)} tokens, and a row has {length}; give more text")
    return words[: len(words) // length * length].view(-1, length)


def _arrays(path: Path, model: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    found = np.load(path)
    arrays = {model.main_input_name: found} if isinstance(found, np.ndarray) else dict(found)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"--data {path}: expected arrays with equally many samples, at least 1; got {sizes}")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_compact(granularity: str) -> None:
    """Raise ``ValueError`` for a granularity that leaves all channels of a model of transformers."""
    if granularity not in CHANNELS:
        raise ValueError(
            f"--compact: --granularity {granularity} leaves every channel, and a folder of transformers gets "
            "smaller where channels go; take --granularity head --scope uniform, or leave --compact out"
        )


def _zeros(folder: Path, pruned: nn.Module) -> list[str]:
    """Give a line on weights that are zero although they are kept: where masks are gone, they count too."""
    masks = fxprune.masks(pruned)
    whole = sum(mask.numel() for mask in masks.values())
    gone = sum(int((~mask).sum()) for mask in masks.values())
    zero = sum(int((mask & (pruned.get_parameter(name) == 0)).sum()) for name, mask in masks.items())
    if not zero:
        return []
    return [
        f"{folder}: {zero:,} kept weights are zero themselves; without masks, as fxprune analyze hf: reads"
        f" the folder, the sparsity is {(gone + zero) / whole:.4%}"
    ]


def write_folder(
    folder: Path,
    pruned: nn.Module,
    source: str,
    network: nn.Module,
    small: fx.GraphModule | None = None,
    inputs: Any = None,
) -> tuple[dict[str, int], list[str]]:
    """Write a pruned model of transformers as a folder that ``from_pretrained`` reads.

    Args:
        folder: made if it is not there.
        pruned: the masked model.
        source: ``hf:PATH``, whose tokenizer is copied.
        network: the dense model.
        small: the compact network. If the model's class can have its shapes, they stand in ``config.json``;
            else shapes are those of the dense model, and pruned weights are zeros.
        inputs: by name; the written model is compared on them with the masked one.

    Returns:
        Bytes by file, and lines that say why shapes are dense although ``small`` is there, and what the
        folder, which has no masks, is counted as when it is read.
    """
    lines: list[str] = []
    final: Any = None
    if small is not None:
        from fxprune.cli.resized import resized

        try:
            final = resized(network, pruned, small, inputs)
        except ValueError as error:
            lines.append(f"{folder}: dense shapes with zeros, for {error}")
    folder.mkdir(parents=True, exist_ok=True)
    if final is None:
        lines += _zeros(folder, pruned)
        final = fxprune.finalize(pruned)
    final.save_pretrained(folder)
    origin = folder_of(source)
    assert origin is not None
    for file in sorted(origin.iterdir()):
        wanted = file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json")
        if wanted and file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}, lines
