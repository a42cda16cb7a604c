"""Keep the times of layers on disk: one file for each machine, runtime and number of threads."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fxprune.latency.layers import Widths
from fxprune.whole_files import write_text

__all__ = ["Table", "cache_folder", "machine", "open_table"]

PACKAGES = {"eager": ("torch",), "compile": ("torch",), "onnxruntime": ("onnxruntime",)}


@dataclass
class Table:
    """Hold measured times, by the facts of the machine that they were measured on.

    ``layers``: by `Layer.key`. ``networks``: by a digest, what was measured of a network and of
    half of it, as :func:`fxprune.latency.cost.fit` takes it.
    """

    machine: dict[str, str]
    path: Path
    layers: dict[str, Widths] = field(default_factory=dict)
    networks: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)

    def save(self) -> None:
        """Write the table; another process that writes it at the same time does no harm."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {
                "machine": self.machine,
                "layers": {
                    key: {"outputs": one.outputs, "inputs": one.inputs, "times": one.times}
                    for key, one in self.layers.items()
                },
                "networks": self.networks,
            }
        )
        write_text(self.path, text)


def machine(device: torch.device, runtime: str, threads: int) -> dict[str, str]:
    """Return the facts that times depend on."""
    gpu = device.type == "cuda"
    facts = {
        "runtime": runtime,
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": str(threads),
    }
    return facts | {package: version(package) for package in PACKAGES[runtime]}


def cache_folder() -> Path:
    """Return where tables are kept: ``$XDG_CACHE_HOME/fxprune/latency``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune" / "latency"


def open_table(facts: Mapping[str, str]) -> Table:
    """Return the table of a machine, an empty one if there is none.

    Warns (``UserWarning``) where only tables from other machines or versions are there: nothing of them is
    used, and all is measured anew.
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"{facts['runtime']}-{digest}.json"
    found = _read(path)
    if found is not None and found["machine"] == dict(facts):
        layers = {
            key: Widths(tuple(one["outputs"]), tuple(one["inputs"]), tuple(map(tuple, one["times"])))
            for key, one in found["layers"].items()
        }
        networks = {key: [tuple(numbers) for numbers in pairs] for key, pairs in found["networks"].items()}
        return Table(dict(facts), path, layers, networks)
    same = facts["runtime"], facts["threads"]
    for other in sorted(path.parent.glob("*.json")) if path.parent.is_dir() else ():
        known = _read(other)
        if known is not None and (known["machine"]["runtime"], known["machine"]["threads"]) == same:
            warnings.warn(
                f"latency: the table {other} is from another machine or version "
                f"({_words(known['machine'])}; this is {_words(facts)}): measured anew",
                stacklevel=2,
            )
            break
    return Table(dict(facts), path)


def _read(path: Path) -> dict[str, dict[str, Any]] | None:
    """The content of a table's file; ``None`` where there is no table in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and {"machine", "layers", "networks"} <= found.keys()
    return found if whole and {"runtime", "threads"} <= found["machine"].keys() else None


def _words(facts: Mapping[str, str]) -> str:
    rest = [
        f"{name} {value}" for name, value in facts.items() if name not in ("device", "runtime", "threads")
    ]
    return ", ".join([facts["device"], *rest])


def _processor() -> str:
    """The processor's name, as the system gives it, and the number of its cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} x {os.cpu_count()}"
