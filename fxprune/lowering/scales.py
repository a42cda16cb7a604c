"""Tell whether a number only scales others, as the length that a vector is divided by."""

from __future__ import annotations

from torch import fx

from fxprune.capture.tracer.spelling import called

__all__ = ["only_scales", "scales_its_source"]

STEPS = 8
"""What is scaled is computed from what was squared in fewer: casts, shapes, a part of it."""

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
    return _scaled(node) is not None


def scales_its_source(node: fx.Node) -> bool:
    """Whether all that comes of a sum of squares scales what was squared, or what was computed from that.

    A sum of squares of one thing that scales another one is a gate: there are paths through it.

    Example:
        >>> graph = fx.Graph()
        >>> x, y = graph.placeholder("x"), graph.placeholder("y")
        >>> total = graph.call_method("sum", (graph.call_method("square", (x,)), -1))
        >>> _ = graph.output(graph.call_method("mul", (y, total)))
        >>> scales_its_source(total)
        False
    """
    scaled = _scaled(node)
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and called(source) not in ("pow", "square", "mul", "multiply"):
        source = source.all_input_nodes[0] if source.all_input_nodes else None
    if not scaled or not isinstance(source, fx.Node):
        return False
    squared = source.all_input_nodes[0]
    return all(_is_computed_from(each, squared) for each in scaled)


def _scaled(node: fx.Node) -> set[fx.Node] | None:
    """The nodes that are multiplied or divided by what comes of a node; None if that does anything else."""
    pending, seen, scaled = [node], {node}, set[fx.Node]()
    while pending:
        users = list(pending.pop().users)
        if not users:
            return None
        for user in users:
            name = called(user)
            others = [part for part in user.all_input_nodes if part not in seen and part.op != "get_attr"]
            if name in SCALES and others:
                scaled.update(others)
                continue
            if user in seen:
                continue
            if name not in KEPT and name not in SCALES:
                return None
            seen.add(user)
            pending.append(user)
    return scaled


def _is_computed_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is another one, or computed from it in a few steps."""
    near = {node}
    for _ in range(STEPS):
        if source in near:
            return True
        near |= {each for one in near for each in one.all_input_nodes}
    return source in near
