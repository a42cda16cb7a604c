"""Capture what is asked for: the model, or a call of it where its own forward has no graph."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn

from fxprune.capture import CaptureError, example_inputs_for, in_shell, warn_of_shell
from fxprune.capture.errors import HookError
from fxprune.network import Asker, Network, captured, inside
from fxprune.progress import Display
from fxprune.request import Request
from fxprune.sparsity.granularity import Channel

__all__ = ["captured_or_called"]


def captured_or_called(
    given: nn.Module, source: nn.Module, example_inputs: Any, wish: Request, asker: Asker, display: Display
) -> tuple[Network, Request]:
    """Capture a model as :func:`fxprune.network.captured` does, and return the request to go on with.

    Where the model's own forward has no graph and one is needed, this calls the model as a whole; its parts
    have other names then, in the request as well.
    """
    try:
        return captured(given, source, example_inputs, wish, asker, display), wish
    except CaptureError as refusal:
        if isinstance(source, fx.GraphModule) or isinstance(refusal, HookError):
            raise
        args, kwargs = example_inputs_for(source, example_inputs)
        wish = wish.in_shell()
        shells = in_shell(inside(given)), in_shell(source)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "capture: model ")  # said of the model itself below
                network = captured(*shells, kwargs or args, wish=wish, asker=asker, display=display)
        except CaptureError:
            raise refusal from None
        paths = "graph" in asker.needs or isinstance(wish.granularity, Channel)
        if paths and not network.graph.kernels:  # nothing is known of what is inside
            raise
        warn_of_shell(refusal)
        return network, wish
