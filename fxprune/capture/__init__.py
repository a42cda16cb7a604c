"""Capture: a model goes in, a faithful ``torch.fx.GraphModule`` with shapes comes out."""

from fxprune.capture.entry import capture, capture_leaf, capture_own, capture_part, warn_of_shell
from fxprune.capture.errors import CaptureError, CarriedOver, Overwritten
from fxprune.capture.inputs import example_inputs_for
from fxprune.capture.modes import ModeBranch, ModeSwitch, evaluation_only
from fxprune.capture.shell import calls_whole, in_shell, renamed

__all__ = [
    "CaptureError",
    "CarriedOver",
    "ModeBranch",
    "ModeSwitch",
    "Overwritten",
    "calls_whole",
    "capture",
    "capture_leaf",
    "capture_own",
    "capture_part",
    "evaluation_only",
    "example_inputs_for",
    "in_shell",
    "renamed",
    "warn_of_shell",
]
