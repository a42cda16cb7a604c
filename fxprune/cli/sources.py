"""Networks and data by name: ``timm:NAME``, ``torchvision:NAME`` or ``path/to/file.py:factory`` comes in."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn


def load_network(source: str, seed: int) -> tuple[nn.Module, Any]:
    """The network that ``source`` names, freshly initialised under ``seed``, and its example inputs.

    The inputs are None where the network says itself what it takes. A factory in a file returns a module, or
    a pair of a module and example inputs. The global random state is left as it was.

    Raises ``ValueError`` or ``TypeError``, naming ``source``, where there is no such network.

    >>> type(load_network("torchvision:resnet18", 0)[0]).__name__
    'ResNet'
    """
    kind, _, name = source.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "timm":
            if not timm.is_model(name):
                raise ValueError(_unknown(source, name, timm.list_models()))
            return timm.create_model(name), None
        if kind == "torchvision":
            if name not in torchvision.models.list_models():
                raise ValueError(_unknown(source, name, torchvision.models.list_models()))
            return torchvision.models.get_model(name), None
        made = _factory(source)()
    network, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{source!r} returned a {type(network).__name__}, expected a torch.nn.Module, or a pair of one "
            "and its example inputs"
        )
    return network, inputs


def load_data(source: str) -> Any:
    """What the factory ``path/to/file.py:factory`` returns: (x, y), or an iterable of batches."""
    return _factory(source)()


def _factory(source: str) -> Callable[[], Any]:
    name, _, attribute = source.rpartition(":")
    path = Path(name)
    if path.suffix != ".py" or not attribute:
        raise ValueError(f"{source!r}: expected timm:NAME, torchvision:NAME or path/to/file.py:factory")
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
