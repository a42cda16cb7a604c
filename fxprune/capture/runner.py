"""Run the nodes of a graph one by one, as the graph's own code runs them."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

__all__ = ["NodeRunner"]


class NodeRunner(fx.Interpreter):
    """Gives a node new lists and dicts, as code does that spells them out: functions may write into them.

    Example:
        >>> import operator
        >>> graph = fx.Graph()
        >>> _ = graph.call_function(operator.setitem, ({"scores": 1}, "scores", 2))
        >>> _ = graph.output("done")
        >>> NodeRunner(fx.GraphModule({}, graph)).run()
        'done'
    """

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _new(args), _new(kwargs)


def _new(value: Any) -> Any:
    if isinstance(value, immutable_list):
        return [_new(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _new(item) for key, item in value.items()}
    return tuple(map(_new, value)) if type(value) is tuple else value
