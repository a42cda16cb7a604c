"""Keep a smaller network the same in training where code of the model goes another way there.

Switches of a graph choose between two values by the mode. Paths are those of evaluation; what training reads
in place of it must not go either, and must have the same channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture import ModeBranch, ModeSwitch
from fxprune.graph import ChannelGraph, ir
from fxprune.rewrite.compact.trial import RUN_ERRORS, NodeFailure, difference, first_difference
from fxprune.rewrite.compact.unchecked import Unchecked
from fxprune.torch_private import pytree

__all__ = ["buffers_kept", "check_training", "of_both_modes"]

TOLERANCE = 1e-4
"""Of the largest entry, in the numbers' own type; entries of other channels differ by more."""


def of_both_modes(graph: ChannelGraph) -> ChannelGraph:
    """Return the graph with the paths of training beside those of evaluation: what either reads is used."""
    more = list(graph.training_outputs)
    ops: list[ir.AnyOp] = []
    for op in graph.ops:
        other = graph.in_training.get(op.output.index)
        if other is not None and other.shape == op.output.shape:
            output = replace(op.output, live=op.output.live or other.live)
            op = ir.Sum(output, (*op.inputs, other), op.node, op.layer, op.inner, op.params)
        elif other is not None:
            more += [other, op.output]
        ops.append(op)
    if not more and not graph.in_training:
        return graph
    ops = [replace(op, inputs=(*op.inputs, *more)) if isinstance(op, ir.Sink) else op for op in ops]
    return replace(graph, ops=tuple(ops), programs={})


def check_training(
    gm: fx.GraphModule, small: fx.GraphModule, inputs: Sequence[Any], *, numbers: bool
) -> None:
    """Raise `NodeFailure` where ``small`` does not go the way of training, or not as ``gm`` does.

    Norms and dropout stay in evaluation, so that no statistic changes, and nothing is drawn but by code that
    runs in training alone: then the sizes are compared, as they are without ``numbers``. A network that goes
    the same way in both modes is not run.
    """
    if not any(_is_choice(node, gm) for node in gm.graph.nodes):
        return
    with buffers_kept(gm, small), torch.no_grad():
        _check_training(gm, small, inputs, numbers)


@contextmanager
def buffers_kept(*networks: nn.Module) -> Iterator[None]:
    """Give buffers their numbers back on leaving: code of training alone may write into them."""
    kept = [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, numbers in kept:
                if not torch.equal(buffer, numbers):
                    buffer.copy_(numbers)


def _check_training(gm: fx.GraphModule, small: fx.GraphModule, inputs: Sequence[Any], numbers: bool) -> None:
    before = _InTraining(gm)
    try:
        old = before.run(*inputs)
    except NodeFailure:
        return  # it does not train as it is
    after = _InTraining(small)
    new = after.run(*inputs)
    if _sizes(old) != _sizes(new):
        raise _failure(_returned(small), "sizes")
    if numbers and not difference(old, new) <= TOLERANCE:
        again = _InTraining(gm, seed=1)
        if difference(old, again.run(*inputs)) <= TOLERANCE:
            node = first_difference(before.found, after.found, TOLERANCE) or _returned(small)
            raise _failure(node, "numbers")


def _failure(node: str, others: str) -> NodeFailure:
    error = ValueError(f"in training it gives other {others}")
    failure = NodeFailure(node, error)
    failure.__cause__ = error
    return failure


class _InTraining(Unchecked):
    """Goes the way of training wherever a graph chooses between tensors; keeps what nodes give."""

    def __init__(self, gm: fx.GraphModule, seed: int = 0) -> None:
        super().__init__(gm, seed)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = self._chosen(n) if _is_choice(n, self.module) else super().run_node(n)
        except (*RUN_ERRORS, KeyError, AttributeError) as error:  # a module in evaluation gives other members
            raise NodeFailure(n.name, error) from error
        self.found[n.name] = result.clone() if isinstance(result, Tensor) else result
        return result

    def _chosen(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        module: Any = self.module.get_submodule(str(n.target))
        if isinstance(module, ModeSwitch):
            return args[0]
        return Unchecked(module.when_training, self.seed).run(*args)


def _is_choice(node: fx.Node, gm: torch.nn.Module) -> bool:
    """Whether a node chooses between tensors by the mode, and not between numbers as those of dropout."""
    if node.op != "call_module":
        return False
    given = [x for source in node.all_input_nodes for x in pytree.tree_leaves(source.meta.get("val"))]
    kinds = (ModeSwitch, ModeBranch)
    tensors = any(isinstance(x, Tensor) for x in given)
    return tensors and isinstance(gm.get_submodule(str(node.target)), kinds)


def _returned(gm: fx.GraphModule) -> str:
    """The node behind which the outputs stand."""
    return next((node.name for node in gm.graph.output_node().all_input_nodes), "output")


def _sizes(result: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
