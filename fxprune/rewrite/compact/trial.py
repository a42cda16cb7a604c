"""Run the original and the smaller network on made-up inputs, and compare what their nodes give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from fxprune.rewrite.compact.unchecked import Unchecked
from fxprune.rewrite.masking.copying import cast_numbers
from fxprune.torch_private import DisableTorchFunction, pytree

__all__ = [
    "RUN_ERRORS",
    "NodeFailure",
    "OutputsDiffer",
    "difference",
    "differing_node",
    "first_difference",
    "in_double",
    "outputs_of",
    "set_shapes",
    "shapes_of_run",
    "trial_inputs",
    "two_runs",
    "verified",
]

RUN_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


class OutputsDiffer(RuntimeError):
    """Raised where the smaller network computes something else; ``node`` is the first that does."""

    def __init__(self, found: float, node: str) -> None:
        super().__init__(
            f"compact: outputs differ by {found:.2e} of the largest, first at node {node!r}; "
            "please report the network, or pass verify=False"
        )
        self.node = node


class NodeFailure(Exception):
    """Raised where a node of the smaller graph does not run."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(f"{node}: {error}")
        self.node = node


def two_runs(gm: fx.GraphModule, example_inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return two sets of inputs that the network runs on.

    Whole numbers are drawn as :func:`trial_inputs` does, or are those of the examples if the network takes no
    others (sizes, lengths, edges). Raises ``ValueError`` where neither will do.
    """
    drawn = trial_inputs(gm, example_inputs, 0), trial_inputs(gm, example_inputs, 1)
    leaves = pytree.tree_leaves(drawn[0])
    if not any(isinstance(x, Tensor) and _is_whole(x) for x in leaves):
        return drawn
    try:
        for inputs in drawn:
            outputs_of(gm, inputs)
    except RUN_ERRORS as error:
        if example_inputs is None:
            line = str(error).split("\n")[0]
            raise ValueError(
                f"example_inputs=None: the network does not run on whole numbers that are made up ({line}); "
                "pass inputs that it takes"
            ) from error
        first, second = (trial_inputs(gm, example_inputs, seed, whole=False) for seed in (0, 1))
        return first, second
    return drawn


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def trial_inputs(
    gm: fx.GraphModule, example_inputs: Any, seed: int, *, whole: bool = True
) -> tuple[Any, ...]:
    """Return inputs for every placeholder: numbers drawn anew in the shape and the range of the examples.

    Without ``whole``, whole numbers are those of the examples.
    """
    given: dict[str, Any] = {}
    names = [str(node.target).lstrip("*") for node in gm.graph.nodes if node.op == "placeholder"]
    if isinstance(example_inputs, Mapping):
        given = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        given = dict(zip(names, example_inputs, strict=False))
    elif isinstance(example_inputs, Tensor):
        given = {names[0]: example_inputs}
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))

    def draw(example: Any) -> Any:
        if not isinstance(example, Tensor):
            return example
        if example.is_floating_point():
            return torch.randn(example.shape, generator=generator).to(device, example.dtype)
        if not _is_whole(example) or not (whole or example.is_meta):
            return example.to(device) if not example.is_meta else torch.ones_like(example, device=device)
        low, high = (0, 2) if example.is_meta else (int(example.min()), int(example.max()) + 1)
        return torch.randint(low, max(high, low + 1), example.shape, generator=generator).to(
            device, example.dtype
        )

    inputs = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            inputs.append(pytree.tree_map(draw, given.get(name, node.meta["val"])))
    return tuple(inputs)


class _Watching(Unchecked):
    """Keeps what nodes give: their shapes on the meta device, or the numbers of some."""

    def __init__(self, gm: fx.GraphModule, numbers: bool, seed: int = 0) -> None:
        super().__init__(gm, seed)
        self.numbers = numbers
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except RUN_ERRORS as error:
            raise NodeFailure(n.name, error) from error
        self.found[n.name] = result if self.numbers else _shapes(result)
        return result


def _shapes(result: Any) -> Any:
    """The result with tensors on the meta device."""
    return pytree.tree_map(_meta, result, is_leaf=lambda x: isinstance(x, PackedSequence))


def _meta(x: Any) -> Any:
    if isinstance(x, PackedSequence):  # its own class asks for a device when it is made
        kind: Any = type(x)
        return kind._make(map(_meta, x))
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x


class _Widening(TorchFunctionMode):
    """Widens the numbers that code makes by itself, as constants in float32, to float64 or complex128."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        with DisableTorchFunction():
            return pytree.tree_map(_widened, result)


def _widened(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def set_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run the graph once, note the shape of every node, and return the outputs; `NodeFailure` if it fails."""
    found, result = shapes_of_run(gm, inputs)
    for node in gm.graph.nodes:
        if node.name in found:
            node.meta["val"] = found[node.name]
    return result


def shapes_of_run(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """Run the graph once; return what every node gives, on the meta device, and the outputs.

    Raises `NodeFailure` where a node does not run.
    """
    watching = _Watching(gm, numbers=False)
    with torch.no_grad():
        result = watching.run(*inputs)
    return watching.found, result


def outputs_of(gm: fx.GraphModule, inputs: Sequence[Any], seed: int = 0) -> Any:
    """Return the network's outputs; ``seed`` is that of the random numbers it draws."""
    with torch.no_grad():
        return Unchecked(gm, seed).run(*inputs)


def in_double(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return the inputs with real numbers in float64, and complex ones in complex128."""

    return tuple(pytree.tree_map(_widened, x) for x in inputs)


def difference(old: Any, new: Any) -> float:
    """Return the largest difference of two nests of tensors, over the largest entry of the first."""
    largest, scale = 0.0, 0.0
    a, b = pytree.tree_leaves(old), pytree.tree_leaves(new)
    for one, other in zip(a, b, strict=True):
        if isinstance(one, Tensor) and one.numel():
            if one.shape != other.shape or one.dtype != other.dtype:
                return float("inf")
            if not (one.is_floating_point() or one.is_complex()):
                largest = max(largest, 0.0 if torch.equal(one, other) else float("inf"))
                continue
            finite = torch.isfinite(one)
            if not torch.equal(finite, torch.isfinite(other)):
                return float("inf")
            if bool(finite.any()):
                largest = max(largest, float((one - other)[finite].abs().max()))
                scale = max(scale, float(one[finite].abs().max()))
    return largest / scale if scale else largest


def differing_node(
    old: fx.GraphModule, new: fx.GraphModule, inputs: Sequence[Any], tolerance: float, seed: int = 0
) -> str:
    """Return the first node whose numbers differ where its shape is the same."""
    runs = []
    for gm in (old, new):
        watching = _Watching(gm, numbers=True, seed=seed)
        with torch.no_grad():
            watching.run(*inputs)
        runs.append(watching.found)
    return first_difference(runs[0], runs[1], tolerance) or "output"


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> str:
    """Return the first node whose numbers differ where its shape is the same; "" if there is none."""
    for name, value in old.items():
        other = new.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
            if value.is_floating_point() and difference(value, other) > tolerance:
                return name
    return ""


def verified(
    gm: fx.GraphModule,
    small: fx.GraphModule,
    runs: tuple[Any, Any],
    outputs: tuple[tuple[Any, Any], ...],
    in_float64: Callable[[], fx.GraphModule],
) -> float:
    """Return the largest relative difference; an error that names the first node if it is too large.

    ``outputs``: by run, those of both networks, with its number as the seed. What is over the tolerance in
    float32 is compacted and computed again in float64, which tells rounding, also that of constants which
    moved into biases, from error.
    """
    double = all(p.dtype == torch.float64 for p in gm.parameters() if p.is_floating_point())
    worst = 0.0
    for seed, (inputs, (old, new)) in enumerate(zip(runs, outputs, strict=True)):
        found = difference(old, new)
        if found <= (1e-10 if double else 1e-5):
            worst = max(worst, found)
            continue
        with _Widening():
            twice = cast_numbers(copy.deepcopy(gm), torch.float64)
            half, wide = in_float64(), in_double(inputs)
            exact = difference(outputs_of(twice, wide, seed), outputs_of(half, wide, seed))
            if not exact <= 1e-10:
                raise OutputsDiffer(found, differing_node(twice, half, wide, 1e-10, seed))
        worst = max(worst, exact)
    return worst
