"""Networks and data by name: ``timm:NAME``, ``torchvision:NAME``, ``hf:PATH`` or ``file.py:factory``."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.cli.hugging_face import folder_of, load_calibration, load_folder

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("timm", "torchvision")


def load_network(source: str, seed: int) -> tuple[nn.Module, Any]:
    """The network that ``source`` names, freshly initialised under ``seed``, and its example inputs.

    A folder of transformers, ``hf:PATH``, has its weights. The inputs are None where the network says itself
    what it takes. A factory in a file returns a module, or a pair of a module and example inputs.
    The global random state is left as it was.

    Raises ``ValueError`` or ``TypeError``, naming ``source``, where there is no such network.

    >>> type(load_network("torchvision:resnet18", 0)[0]).__name__
    'ResNet'
    """
    import torch

    kind, _, name = source.partition(":")
    if folder_of(source) is not None:
        return load_folder(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in LIBRARIES:
            if not _is_model(kind, name):
                raise ValueError(_unknown(source, name, list_models(kind)))
            return make_model(kind, name), None
        made = _factory(source)()
    network, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, torch.nn.Module):
        raise TypeError(
            f"{source!r} returned a {type(network).__name__}, expected a torch.nn.Module, or a pair of one "
            "and its example inputs"
        )
    return network, inputs


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


def load_data(source: str, model: str = "", network: nn.Module | None = None) -> Any:
    """Return the data of the factory ``path/to/file.py:factory``: (x, y), or an iterable of batches.

    For the ``network`` of a folder of transformers (``model`` is ``hf:PATH``) also text or arrays in a file.
    """
    if folder_of(model) is not None and network is not None and ".py:" not in source:
        return load_calibration(Path(source), model, network)
    return _factory(source)()


def _factory(source: str) -> Callable[[], Any]:
    name, _, attribute = source.rpartition(":")
    path = Path(name)
    if path.suffix != ".py" or not attribute:
        raise ValueError(
            f"{source!r}: expected timm:NAME, torchvision:NAME, hf:PATH or path/to/file.py:factory"
        )
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
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{source!r}: {path.name} defines no function {attribute!r}")
    found: Callable[[], Any] = factory
    return found


def _unknown(source: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see its list_models()"
    return f"{source!r}: {source.partition(':')[0]} has no model of that name{hint}"
