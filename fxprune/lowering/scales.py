"""Tell whether a number only scales others, as the length that a vector is divided by."""

from __future__ import annotations

from torch import fx

from fxprune.capture.tracer.spelling import called

__all__ = ["only_scales"]

SCALES = frozenset(
    ("mul", "imul", "mul_", "multiply", "truediv", "itruediv", "div", "div_", "divide", "true_divide")
)
KEPT = frozenset(
    """
    add add_ iadd amax clamp clamp_ clamp_max clamp_min clamp_min_ contiguous detach double exp expand
    expand_as float getitem half isub log masked_fill max maximum mean min minimum neg permute pow reciprocal
    reshape rsqrt sqrt square squeeze sub to transpose type type_as unsqueeze view where
    """.split()
)


def only_scales(node: fx.Node) -> bool:
    """Whether all that comes of a node multiplies or divides what other nodes compute.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> length = graph.call_method("norm", (x,))
        >>> _ = graph.output(graph.call_method("div", (x, length)))
        >>> only_scales(length)
        True
    """
    pending, seen = [node], {node}
    while pending:
        users = list(pending.pop().users)
        if not users:
            return False
        for user in users:
            name = called(user)
            others = [part for part in user.all_input_nodes if part not in seen and part.op != "get_attr"]
            if user in seen or (name in SCALES and others):
                continue
            if name not in KEPT and name not in SCALES:
                return False
            seen.add(user)
            pending.append(user)
    return True
