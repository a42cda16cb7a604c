"""Networks by name: ``timm:NAME``, ``torchvision:``, ``zoo:``, ``hf:FOLDER``, ``path/to/file.py:factory``."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import fxprune
from fxprune.cli.hugging_face import folder_of, load_folder

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("timm", "torchvision")
ZOO = ("conv2", "conv4", "conv6", "lenet_300_100", "resnet18_tiny", "resnet20", "vgg19_bn")
EXPECTED = "timm:NAME, torchvision:NAME, zoo:NAME, hf:FOLDER or path/to/file.py:factory"
WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".onnx", ".pt2")
"""Endings of files that hold weights or compiled networks, and no code to build one with."""
RAISED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""Errors that the code in a file may raise."""


def load_network(
    source: str,
    seed: int,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    weights: str | Path | None = None,
) -> tuple[nn.Module, Any]:
    """Build the network that ``source`` names, freshly initialised under ``seed``; return its inputs too.

    A folder of transformers, ``hf:PATH``, has its weights. The inputs are None where the network says itself
    what it takes. A factory in a file returns a module, or a pair of a module and example inputs.
    The global random state is left as it was.

    Args:
        source: the name.
        seed: of the weights that are drawn.
        pretrained: take the published weights of timm or torchvision instead.
        num_classes: number of outputs; a factory in a file then takes it as ``num_classes``.
        weights: a file of a state dict, or one that ``fxprune.save`` wrote, to load.

    Raises ``ValueError`` or ``TypeError``, naming ``source``, where there is no such network; ``OSError``
    where published weights cannot be fetched.

    >>> type(load_network("torchvision:resnet18", 0)[0]).__name__
    'ResNet'
    """
    import torch

    kind, _, name = source.partition(":")
    if pretrained and kind not in LIBRARIES:
        raise ValueError(f"--pretrained: {source!r} has no published weights; timm: and torchvision: have")
    if folder_of(source) is not None:
        if num_classes is not None or weights is not None:
            raise ValueError(
                f"{source!r}: a folder has its classes and weights; leave --num-classes and --weights"
            )
        return load_folder(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in LIBRARIES:
            made = _from_library(source, kind, name, pretrained, num_classes)
        elif kind == "zoo":
            made = _from_zoo(source, name, num_classes)
        else:
            made = _from_file(source, num_classes)
    network, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, torch.nn.Module):
        raise TypeError(
            f"{source!r} returned an object of type {type(network).__name__}, expected a torch.nn.Module, or"
            " a pair of one and its example inputs"
        )
    return network if weights is None else load_weights(network, Path(weights)), inputs


def _from_library(source: str, kind: str, name: str, pretrained: bool, classes: int | None) -> nn.Module:
    if not _is_model(kind, name):
        raise ValueError(_unknown(source, name, list_models(kind)))
    sizes: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if pretrained and kind == "timm":
        sizes["pretrained"] = True
    elif pretrained:
        sizes["weights"] = "DEFAULT"
        if classes is not None:
            raise ValueError("--num-classes: torchvision's published weights have the classes of their data")
    if "." in name and kind == "timm" and not pretrained:
        warnings.warn(
            f"{source} names published weights, but these are drawn at random; --pretrained loads them",
            UserWarning,
            stacklevel=2,
        )
    return make_model(kind, name, **sizes)


def _from_zoo(source: str, name: str, classes: int | None) -> Any:
    if name not in ZOO:
        raise ValueError(f"{source!r}: the zoo has {', '.join(ZOO)}")
    import torch

    sizes = {} if classes is None else {"classes": classes}
    channels, size = {"l": (1, 28), "c": (1, 28)}.get(name[0], (3, 64 if name == "resnet18_tiny" else 32))
    return getattr(fxprune.zoo, name)(**sizes), torch.empty(2, channels, size, size)


def _from_file(source: str, classes: int | None) -> Any:
    factory = load_factory(source)
    if classes is None:
        return factory()
    if "num_classes" not in inspect.signature(factory).parameters:
        raise ValueError(f"--num-classes: the factory of {source!r} has no argument num_classes")
    return factory(num_classes=classes)


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load a file of weights into ``network``: a state dict, or what ``fxprune.save`` wrote.

    Checkpoints of training scripts, with the state dict under ``state_dict`` or ``model``, will do. Nothing
    in the file can run code. Raises ``ValueError`` or ``FileNotFoundError``, naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--weights {path}: there is no such file")
    state = _read_state(path)
    if state is None:
        loaded: nn.Module = fxprune.load(path, network)
        return loaded
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    prefix = "module."
    if state and all(str(key).startswith(prefix) for key in state):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    try:
        wrong = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise ValueError(f"--weights {path}: not of this network: {line}; is --num-classes right?") from error
    for some, word in ((wrong.missing_keys, "has no"), (wrong.unexpected_keys, "has an unknown")):
        if some:
            more = f", and {len(some) - 1} more" if len(some) > 1 else ""
            raise ValueError(f"--weights {path}: {word} {some[0]!r}{more}; expected those of this network")
    return network


def _read_state(path: Path) -> Any:
    """Read a state dict; return None for a file of fxprune."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        if fxprune.rewrite.read_header(path).get("format") == "fxprune":
            return None
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"--weights {path}: not a file of weights ({str(error).splitlines()[0].split('. ')[0]})"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"--weights {path}: holds a {type(state).__name__}, expected a state dict")
    return dict(state)


def list_models(library: str) -> list[str]:
    """List the names of the models of ``"timm"`` or ``"torchvision"``."""
    if library == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return list(torchvision.models.list_models())


def make_model(library: str, name: str, **sizes: Any) -> nn.Module:
    """Make a model of ``"timm"`` or ``"torchvision"``; ``sizes`` are keyword arguments of its constructor."""
    if library == "timm":
        import timm

        network: nn.Module = timm.create_model(name, **sizes)
        return network
    import torchvision

    network = torchvision.models.get_model(name, **sizes)
    return network


def _is_model(library: str, name: str) -> bool:
    """Return whether the library has the model; timm also knows names with a tag, ``resnet18.a1_in1k``."""
    if library == "timm":
        import timm

        return bool(timm.is_model(name))
    return name in list_models(library)


def load_factory(source: str) -> Callable[..., Any]:
    """Return the function that ``path/to/file.py:factory`` names; ``ValueError`` where there is none.

    What the file or the function raises is a ``ValueError`` too, which names ``source`` and the line.
    """
    name, _, attribute = source.rpartition(":")
    path = Path(name)
    if path.suffix != ".py" or not attribute:
        raise ValueError(_no_source(source))
    if not path.is_file():
        raise ValueError(f"{source!r}: there is no file {name!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As `python file.py` would have it: the file finds its neighbours, and what it defines can be pickled.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules.setdefault(path.stem, module)
    try:
        with _blamed(source, path):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{source!r}: {path.name} defines no function {attribute!r}")

    @functools.wraps(factory)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _blamed(source, path):
            return factory(*args, **kwargs)

    return called


@contextmanager
def _blamed(source: str, path: Path) -> Iterator[None]:
    """Let an error of the code in a file name ``source`` and the last line of the file that ran."""
    try:
        yield
    except RAISED as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path.name if line is None else f"{path.name}, line {line}"
        raise ValueError(f"{source!r}: {where}: {type(error).__name__}: {error}; mend the file") from error


def _no_source(source: str) -> str:
    """Say what is expected in the place of a word that names no network."""
    path, folder = Path(source), "a folder that prune --out wrote"
    if path.suffix in WEIGHTS:
        return (
            f"{source!r}: a file of weights, which holds no network; expected {EXPECTED} with --weights"
            f" {source}, or {folder}"
        )
    if path.suffix == ".py":
        return f"{source!r}: expected {source}:factory, a function in it that returns the network"
    if source.endswith(("/", "\\")) or len(path.parts) > 1:
        return f"{source!r}: there is no such folder; expected {folder}, or {EXPECTED}"
    return f"{source!r}: no folder of that name, and no model; expected {EXPECTED}, or {folder}"


def _unknown(source: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see its list_models()"
    return f"{source!r}: {source.partition(':')[0]} has no model of that name{hint}"
