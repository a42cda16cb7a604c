"""fxprune: a compiler pass that prunes any PyTorch network, on its graph.

>>> import torch, fxprune
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> pruned = fxprune.apply(net, "synflow", sparsity=0.5, example_inputs=torch.ones(2, 8))
>>> fxprune.analyze(pruned).density
0.5
"""

from fxprune.api import analyze, apply
from fxprune.capture import capture
from fxprune.lowering import lower
from fxprune.methods import Method
from fxprune.methods import names as list_methods
from fxprune.plot import plot_history
from fxprune.rewrite import finalize, load_masks, save, set_masks, verify
from fxprune.rewrite import read as masks
from fxprune.training import Pruner, load_ticket, lottery

__all__ = [
    "Method",
    "Pruner",
    "analyze",
    "apply",
    "capture",
    "finalize",
    "list_methods",
    "load_masks",
    "load_ticket",
    "lottery",
    "lower",
    "masks",
    "plot_history",
    "save",
    "set_masks",
    "verify",
]
