"""Walk through a network with all batches at once, node by node, and hold only what later nodes still read.

A captured network is walked along its graph; any other module is one node. Weights may change at every node:
the nodes after it see what the new ones give.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.capture.runner import NodeRunner
from fxprune.scoring.contract import Problem
from fxprune.scoring.data import Batch, pieces
from fxprune.torch_private import pytree

__all__ = ["Arguments", "Stage", "arguments_of", "checked_tokens", "quiet", "stages"]

LABELS = "labels"
"""The key of mapping batches that holds targets, which no walk looks at."""


@dataclass(frozen=True)
class Arguments:
    """Hold what the model is called with: positional and keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def arguments_of(problem: Problem, some: Sequence[Batch], method: str) -> list[Arguments]:
    """Find the arguments of the model's call for every piece of the batches.

    A mapping holds keyword arguments of the model (``labels`` are left out where it takes none, or was
    captured without), or what
    ``problem.loss_fn(model, batch)`` calls the model with: the first call counts.

    Raises ``ValueError`` for a ``loss_fn`` that does not call the model, and for inputs it does not take, or
    was captured without.
    """
    found = []
    for batch in some:
        for piece, _ in pieces(problem, batch):
            if piece.mapping and problem.loss_fn is not None:
                found.append(_called_with(problem, piece, method))
            elif piece.mapping or isinstance(piece.inputs, Mapping):
                found.append(Arguments(kwargs=_taken(problem.model, piece.inputs, method)))
            else:
                several = isinstance(piece.inputs, (tuple, list))
                found.append(Arguments(tuple(piece.inputs) if several else (piece.inputs,)))
    return found


def _taken(model: nn.Module, inputs: Mapping[str, Any], method: str) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return dict(inputs)
    odd = [name for name in inputs if name not in parameters and name != LABELS]
    if odd:
        raise ValueError(
            f"method {method!r}: data has {odd[0]!r}, the model takes {', '.join(parameters) or 'nothing'}; "
            "give it among example_inputs, or leave it out"
        )
    without = _captured_without(model)
    absent = [name for name, value in inputs.items() if isinstance(value, Tensor) and name in without]
    odd = [name for name in absent if name != LABELS]
    if odd:
        raise ValueError(
            f"method {method!r}: data has {odd[0]!r}, which example_inputs has not; give it there too, or"
            " leave example_inputs out"
        )
    return {name: value for name, value in inputs.items() if name in parameters and name not in absent}


def _captured_without(model: nn.Module) -> set[str]:
    """The arguments of a captured model that were no tensors when it was captured."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    return {
        str(node.target)
        for node in nodes
        if node.op == "placeholder" and "val" in node.meta and not isinstance(node.meta["val"], Tensor)
    }


class _Seen(BaseException):
    """The model was called."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


class _Ear(nn.Module):
    """Stands in for the model while its loss is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Seen(Arguments(args, kwargs))


def _called_with(problem: Problem, piece: Batch, method: str) -> Arguments:
    assert problem.loss_fn is not None
    try:
        problem.loss_fn(_Ear(), piece.inputs)
    except _Seen as seen:
        return seen.arguments
    raise ValueError(f"method {method!r}: loss_fn(model, batch) does not call the model")


@contextmanager
def quiet(model: nn.Module, method: str) -> Iterator[None]:
    """Evaluate ``model`` without gradients; put its modes and buffers back afterwards.

    Fused attention, which hides its products, is off. Tokens beyond an embedding raise ``ValueError``.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), checked_tokens(model, f"method {method!r}"):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
        for module, training in modes.items():
            module.training = training


@contextmanager
def checked_tokens(model: nn.Module, who: str) -> Iterator[None]:
    """Raise ``ValueError`` for tokens that an embedding of ``model`` has no row for, while it runs."""

    def check(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            tokens = inputs[0] if inputs else None
            if not isinstance(tokens, Tensor) or tokens.is_meta or not tokens.numel():
                return
            low, high, rows = int(tokens.min()), int(tokens.max()), int(module.num_embeddings)  # type: ignore[arg-type]
            if low < 0 or high >= rows:
                raise ValueError(
                    f"{who}: tokens of data run from {low} to {high}, but embedding {name!r} has {rows} "
                    "rows; take the tokenizer of this model"
                )

        return hook

    tables = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    handles = [module.register_forward_pre_hook(check(name)) for name, module in tables.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Stage:
    """One node with the values that it reads, for every piece of the data.

    ``name``: of the node. ``run(piece)``: its output, on copies of its inputs. ``advance()``: run it for all
    pieces, keep what it gives for the nodes after it, and free what no node reads any more; called once.
    ``read(piece)``: the first value that it reads. ``module``: the module that it calls, ``target`` its path.
    ``is_model``: whether it is all of a model without a graph.
    """

    name: str
    count: int
    run: Callable[[int], Any]
    advance: Callable[[], None]
    read: Callable[[int], Any] | None = None
    module: nn.Module | None = None
    target: str = ""
    is_model: bool = False


def stages(model: nn.Module, calls: Sequence[Arguments]) -> Iterator[Stage]:
    """Yield the nodes of ``model`` that compute, in order; advance each before the next is asked for.

    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    >>> for stage in stages(gm, [Arguments((torch.ones(1, 2),))]):
    ...     print(stage.name, tuple(stage.run(0).shape))
    ...     stage.advance()
    _0 (1, 3)
    _1 (1, 3)
    """
    if not isinstance(model, fx.GraphModule):
        run_all = Stage("model", len(calls), lambda piece: _call(model, calls[piece]), lambda: None)
        run_all.is_model = True
        yield run_all
        return
    runner = NodeRunner(model, garbage_collect_values=False)
    held = [_placed(model, call) for call in calls]
    done = _last_reads(model.graph)

    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def copied(value: Tensor) -> Tensor:
        # Views of a parameter stay what they are, to be recognised.
        return value if value.untyped_storage().data_ptr() in owned else value.clone()

    def run(node: fx.Node, piece: int, copies: bool) -> Any:
        runner.env = held[piece]
        if copies:
            values = held[piece]
            runner.env = values | {
                one: pytree.tree_map_only(Tensor, copied, values[one]) for one in node.all_input_nodes
            }
        return runner.run_node(node)

    def advance(node: fx.Node) -> None:
        for piece, values in enumerate(held):
            values[node] = run(node, piece, copies=False)
            for old in done.get(node, ()):
                values.pop(old, None)

    for node in model.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            advance(node)
            continue
        yield Stage(
            node.name,
            len(calls),
            lambda piece, node=node: run(node, piece, True),  # type: ignore[misc]
            lambda node=node: advance(node),  # type: ignore[misc]
            lambda piece, node=node: held[piece][node.all_input_nodes[0]],  # type: ignore[misc]
            model.get_submodule(str(node.target)) if node.op == "call_module" else None,
            str(node.target),
        )


def _call(model: nn.Module, call: Arguments) -> Any:
    return model(*call.args, **call.kwargs)


def _placed(model: fx.GraphModule, call: Arguments) -> dict[fx.Node, Any]:
    """The values of the placeholders for one call."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    values = bound.arguments
    return {
        node: values[str(node.target).lstrip("*")] for node in model.graph.nodes if node.op == "placeholder"
    }


def _last_reads(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that no node after it reads, its own included where none does."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        if node.op != "output":
            for read in node.all_input_nodes:
                last[read] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        found.setdefault(node, []).append(value)
    return found
