"""fxprune: a compiler pass that prunes any PyTorch network, on its graph.

>>> import torch, fxprune
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> pruned = fxprune.apply(net, "synflow", sparsity=0.5, example_inputs=torch.ones(2, 8))
>>> fxprune.analyze(pruned).density
0.5
"""

import difflib
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.api import analyze, apply
    from fxprune.capture import capture
    from fxprune.evaluation import evaluate, recalibrate
    from fxprune.grouping import channel_groups
    from fxprune.latency import bench
    from fxprune.lowering import lower
    from fxprune.methods import Method
    from fxprune.methods import names as list_methods
    from fxprune.planning import plan
    from fxprune.plans import Plan
    from fxprune.plot import plot_history
    from fxprune.reconstruction import reconstruct
    from fxprune.rewrite import finalize, load_masks, save, set_masks, verify
    from fxprune.rewrite import read as masks
    from fxprune.rewrite.compact import compact, remap_optimizer
    from fxprune.rewrite.files.export import export
    from fxprune.rewrite.files.network import load
    from fxprune.sweeps import sweep
    from fxprune.training import Pruner, load_ticket, lottery
    from fxprune.training.regularizers import regularizer

__version__ = "0.2.0"

__all__ = [
    "Method",
    "Plan",
    "Pruner",
    "analyze",
    "apply",
    "bench",
    "capture",
    "channel_groups",
    "compact",
    "evaluate",
    "export",
    "finalize",
    "list_methods",
    "load",
    "load_masks",
    "load_ticket",
    "lottery",
    "lower",
    "masks",
    "plan",
    "plot_history",
    "recalibrate",
    "reconstruct",
    "regularizer",
    "remap_optimizer",
    "save",
    "set_masks",
    "sweep",
    "verify",
]

# Public name -> where it is. A room is imported when one of its names is first asked for, so that the command
# line can show its help without PyTorch.
_HOMES = {
    "Method": "fxprune.methods.Method",
    "Plan": "fxprune.plans.Plan",
    "Pruner": "fxprune.training.Pruner",
    "analyze": "fxprune.api.analyze",
    "apply": "fxprune.api.apply",
    "bench": "fxprune.latency.bench",
    "capture": "fxprune.capture.capture",
    "channel_groups": "fxprune.grouping.channel_groups",
    "compact": "fxprune.rewrite.compact.compact",
    "evaluate": "fxprune.evaluation.evaluate",
    "export": "fxprune.rewrite.files.export.export",
    "finalize": "fxprune.rewrite.finalize",
    "list_methods": "fxprune.methods.names",
    "load": "fxprune.rewrite.files.network.load",
    "load_masks": "fxprune.rewrite.load_masks",
    "load_ticket": "fxprune.training.load_ticket",
    "lottery": "fxprune.training.lottery",
    "lower": "fxprune.lowering.lower",
    "masks": "fxprune.rewrite.read",
    "plan": "fxprune.planning.plan",
    "plot_history": "fxprune.plot.plot_history",
    "recalibrate": "fxprune.evaluation.recalibrate",
    "reconstruct": "fxprune.reconstruction.reconstruct",
    "regularizer": "fxprune.training.regularizers.regularizer",
    "remap_optimizer": "fxprune.rewrite.compact.remap_optimizer",
    "save": "fxprune.rewrite.save",
    "set_masks": "fxprune.rewrite.set_masks",
    "sweep": "fxprune.sweeps.sweep",
    "verify": "fxprune.rewrite.verify",
}
_ROOMS = (
    "api",
    "data",
    "graph",
    "latency",
    "lowering",
    "methods",
    "metrics",
    "plot",
    "rewrite",
    "sweeps",
    "training",
    "zoo",
)


class _Package(ModuleType):
    """The type of this package: importing the room ``fxprune.capture`` does not hide the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_meant(name)}")
    module, _, attribute = _HOMES[name].rpartition(".")
    globals()[name] = getattr(importlib.import_module(module), attribute)
    return globals()[name]


def _meant(name: str) -> str:
    """Name the public function that a name was meant for, if any is near."""
    other = "apply" if name == "prune" else None
    if other is None and not name.startswith("_"):
        found = difflib.get_close_matches(name, [*_HOMES, *_ROOMS], n=1)
        other = found[0] if found else None
    return "" if other is None else f"; did you mean {other!r}?"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
