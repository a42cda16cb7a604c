"""Run a captured graph on inputs that are made up, which its checks of numbers need not like.

Packed sequences are all as long as the longest one was in the capture, as the graph's shapes say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.torch_private import check_number, pack_padded_sequence

__all__ = ["Unchecked"]


class Unchecked(fx.Interpreter):
    """An interpreter that passes over ``check_number``.

    Example:
        >>> import torch
        >>> graph = fx.Graph()
        >>> _ = graph.call_function(check_number, (False, "never true"))
        >>> _ = graph.output(None)
        >>> Unchecked(fx.GraphModule(torch.nn.Module(), graph)).run()
    """

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.target is pack_padded_sequence and "val" in n.meta:
            padded, lengths, *rest = args
            args = (padded, torch.full_like(lengths, n.meta["val"][1].shape[0]), *rest)
        return args, kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None if target is check_number else super().call_function(target, args, kwargs)
