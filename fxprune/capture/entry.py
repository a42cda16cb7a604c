"""The door: any model becomes a ``torch.fx.GraphModule`` with shapes on every node.

In: a model and example inputs, of which only shapes and types are read. Out: a GraphModule that behaves
like the model in training and in evaluation, at any batch size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fxprune.capture.attributes import Attributes, restored_attributes
from fxprune.capture.collector import collector_paused
from fxprune.capture.errors import (
    TRACE_ERRORS,
    CaptureError,
    CarriedOver,
    HookError,
    InputError,
    Overwritten,
    check_module,
    first_line,
    users_level,
    where,
)
from fxprune.capture.fidelity.compare import Differences, computes_same
from fxprune.capture.fidelity.faithful import Faithful
from fxprune.capture.fidelity.followed_types import resolve_types
from fxprune.capture.fidelity.search import faithful_graph, faithful_part
from fxprune.capture.hooks import keeps_hooks
from fxprune.capture.inputs import example_inputs_for
from fxprune.capture.leaf_forms import leaf_form
from fxprune.capture.leaves import is_compiled, is_leaf
from fxprune.capture.module import CapturedModule, LeafGraph, assemble, assemble_leaf, reserved_names
from fxprune.capture.shell import PREFIX, Shell, in_shell
from fxprune.capture.tracer.calls_replaced import replaced_calls
from fxprune.capture.tracer.isolation import restore_rng, rng_state, seed_rng
from fxprune.capture.tracer.meta_values import map_structure, meta_like
from fxprune.capture.tracer.sample_values import needs_numbers
from fxprune.capture.tracer.spelling import called
from fxprune.capture.tracer.trace import Trace, remove_dead_code, shapes_only, trace
from fxprune.capture.tracer.values import Values
from fxprune.keywords import refuse_unknown
from fxprune.sharded_types import is_dtensor
from fxprune.torch_private import check_number

__all__ = ["capture", "capture_leaf", "capture_own", "capture_part", "warn_of_shell"]

REMEDY = "; move that part into a submodule, which then stays whole"
TRIALS = 6
"""Traces with other random numbers, of a part that draws some: all of them have to be the same."""


def capture(model: nn.Module, example_inputs: Any = None, **others: NoReturn) -> fx.GraphModule:
    """Capture a model as a graph that trains and evaluates as the model does.

    If the model's own forward cannot be traced, the graph calls the model as a whole, with a warning that
    says why; the names of its parts then begin with ``model.``.

    Args:
        model: any module; it is not changed, and need not hold weights (``torch.device("meta")`` will do).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of ``model.forward``.
            Only their shapes and types count, and whole numbers where the code of the model reads them
            (``lengths.max().item()``). Arguments that are no tensors become constants of the graph.
            May be left out where :func:`example_inputs_for` knows the model.

    Returns:
        A ``GraphModule`` with the class name, the submodules, the parameters and the ``state_dict`` keys
        of the model. Every node has ``node.meta["val"]``: a meta tensor, a number, or nested tuples,
        lists and dicts of those.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model does not accept the example inputs (its own error is chained), or there are
        none.
        CaptureError: neither the model's own ``forward`` nor a call of it can be traced, or a forward hook
        cannot; the message names the line.

    Code that checks numbers (``if not torch.isfinite(x).all(): raise ...``) is traced as if they passed; the
    graph raises ``AssertionError`` with the line of that code where they do not. Where both ways are open the
    module stays whole; the model's own ``forward`` goes the way of the example, and the graph raises for
    others.

    A submodule that cannot be traced stays one ``call_module`` node, with a warning that names it and
    says why. Forward hooks are traced as code of the model. A hook that changes nothing in the graph runs
    with it, if the graph calls its module.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1))
        >>> gm = capture(net, torch.ones(2, 4))
        >>> [str(node.target) for node in gm.graph.nodes]
        ['input', '0', '1', '2', 'output']
    """
    refuse_unknown(capture, others)
    try:
        return capture_own(model, example_inputs)
    except HookError:
        raise
    except CaptureError as refusal:
        found = capture_whole(model, example_inputs)
        if found is None:
            raise
        warn_of_shell(refusal)
        return found


def capture_own(model: nn.Module, example_inputs: Any = None) -> CapturedModule:
    """Capture a model as :func:`capture` does, or raise ``CaptureError`` if its own forward has no graph."""
    _check(model)
    args, kwargs = example_inputs_for(model, example_inputs)
    examples: dict[int, Tensor] = {}
    args, kwargs = _shapes(args, examples), _shapes(kwargs, examples)
    try:
        with collector_paused(), replaced_calls():
            found = faithful_graph(model, args, kwargs, examples)
    except HookError:
        raise
    except TRACE_ERRORS as error:
        raise _explained(model, args, kwargs, error) from error
    whole = {str(node.target) for node in found.graph.nodes if node.op == "call_module"}
    for note in _notes(model, found.notes, whole):
        warnings.warn(f"capture: {note}", stacklevel=users_level())
    return assemble(model, found.graph, found.extra, found.kept_hooks)


def warn_of_shell(refusal: CaptureError) -> None:
    """Say that a graph calls its model as a whole, why, and how the parts of the model are called in it."""
    warnings.warn(
        f"capture: {first_line(refusal).split(REMEDY)[0]}; the graph calls it as a whole, and its parts are"
        f" called {PREFIX}…",
        stacklevel=users_level(),
    )


def capture_whole(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule | None:
    """Capture a call of a model, see :class:`.Shell`; None if that cannot be done either."""
    if isinstance(model, (fx.GraphModule, Shell)):
        return None
    args, kwargs = example_inputs_for(model, example_inputs)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "capture: model ")  # said of the model itself
            found = capture_own(in_shell(model), kwargs or args)
    except (CaptureError, InputError):
        return None
    found.in_shell = True
    return found


def capture_leaf(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    attributes: Mapping[str, Attributes] = MappingProxyType({}),
    traced: dict[Hashable, Trace] | None = None,
) -> LeafGraph:
    """The inside of one module in evaluation mode, whether or not :func:`capture` would enter it.

    It is to be looked at, not run: code that asks whether a mask chooses anything, or a list is empty, goes
    on as if there were something to do.

    Args:
        module: the module to open. Those of torch.nn inside it stay whole.
        args: its positional arguments; tensors count by their shape and type.
        kwargs: its keyword arguments.
        attributes: those that it and the modules in it had when its model was captured, by path.
        traced: traces of other leaves, by form; a leaf of a known form takes its trace, and shares its graph.

    Raises:
        CaptureError: it cannot be traced, or has hooks that cannot: backward hooks, and PyTorch's own; or it
            is scripted, so that there is no Python code to trace.

    Example:
        >>> import torch
        >>> gm = capture_leaf(nn.Linear(4, 8), (torch.ones(2, 4),), {})
        >>> [node.op for node in gm.graph.nodes]
        ['placeholder', 'get_attr', 'get_attr', 'call_function', 'output']
    """
    if keeps_hooks(module):
        raise CaptureError(f"{type(module).__name__} has hooks that cannot be traced")
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(f"{type(module).__name__} is scripted: there is no Python code to trace")
    try:
        with restored_attributes(module, attributes):
            form = None if traced is None else leaf_form(module, args, kwargs)
            known = None if traced is None or form is None else traced.get(form)
            given = _shapes(tuple(args)), _shapes(dict(kwargs))
            found = known or _looked_at(module, *given)
    except TRACE_ERRORS as error:
        text = f"{type(module).__name__}: {first_line(error)} ({where(error, module)})"
        if isinstance(error, Overwritten):
            raise Overwritten(error.names, text) from error
        raise CaptureError(text) from error
    if known is None:
        resolve_types(found, Differences())
        remove_dead_code(found.graph)
    if traced is not None and form is not None:
        traced[form] = found
    return assemble_leaf(module, found.graph, found.constants)


def capture_part(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    attributes: Mapping[str, Attributes] = MappingProxyType({}),
) -> tuple[fx.GraphModule, str]:
    """Capture one module of a model that :func:`capture` kept whole, to run in its place.

    Args:
        module: a user's own module.
        args, kwargs, attributes: as in :func:`capture_leaf`.

    Returns:
        Its graph, as :func:`capture` would make it of the module alone, and a note on what the graph does
        not do: in training, or in other types (empty if it does all that is found). Many such modules do
        something in training that no graph can say: then the graph does what evaluation does. What the
        module keeps of what it computed, the graph computes each time.

    Raises:
        CaptureError: it cannot be traced in evaluation, or its graph holds for some numbers, one batch size
            or one image size only.
        CarriedOver: it computes in evaluation with what it wrote in an earlier call; but for that there is a
            graph, and the modules in it that stay whole do so because of training alone.

    Example:
        >>> import torch
        >>> gm, note = capture_part(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (torch.ones(2, 4),), {})
        >>> [str(node.target) for node in gm.graph.nodes], note
        (['input', '0', '1', 'output'], '')
    """
    try:
        with restored_attributes(module, attributes):
            found = faithful_part(module, _shapes(tuple(args)), _shapes(dict(kwargs)))
    except TRACE_ERRORS as error:
        raise CaptureError(
            f"{type(module).__name__}: {first_line(error)} ({where(error, module)})"
        ) from error
    if any(node.target is check_number and _asks_for_numbers(node) for node in found.graph.nodes):
        raise CaptureError(f"{type(module).__name__}: its graph holds for the example inputs only")
    if found.limit or found.carried:
        known = not found.limit and not _parts_not_followed(module, found)
        kind = CarriedOver if known else CaptureError
        raise kind(f"{type(module).__name__}: {found.limit or found.carried}")
    return assemble(module, found.graph, found.extra, found.kept_hooks), found.notes.get("", "")


def _parts_not_followed(module: nn.Module, found: Faithful) -> list[str]:
    """Find the parts that are called as a whole for a reason other than that training differs."""
    called = {str(node.target) for node in found.graph.nodes if node.op == "call_module"} - found.extra.keys()
    return [path for path in called & found.notes.keys() if not is_leaf(module.get_submodule(path))]


def _asks_for_numbers(check: fx.Node) -> bool:
    """Whether the condition of a check depends on the numbers in a tensor, and not on sizes alone."""
    pending = list(check.all_input_nodes)
    while pending:
        node = pending.pop()
        if isinstance(node.meta.get("val"), Tensor):
            return True
        if called(node) not in ("dim", "getattr", "len", "numel", "size"):
            pending += node.all_input_nodes
    return False


def _looked_at(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """A trace in evaluation that is not run; random numbers outside of PyTorch must not matter."""
    values = functools.partial(Values, made_up=None, reached=True)
    before = rng_state()
    try:
        found = trace(module, args, kwargs, training=False, values=values, may_draw=True)
        for seed in range(TRIALS if found.drew else 0):
            seed_rng(seed)
            other = trace(module, args, kwargs, training=False, values=values, may_draw=True)
            if not computes_same(found, other):
                raise CaptureError("its forward decides by random numbers outside PyTorch")
    finally:
        restore_rng(before)
    return found


def _notes(model: nn.Module, notes: Mapping[str, str], whole: set[str]) -> list[str]:
    """One line for every class of modules and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in notes.items():
        groups.setdefault((type(model.get_submodule(path)).__name__, reason), []).append(path)
    lines = []
    for (kind, reason), paths in groups.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        kept = " kept whole" if set(paths) <= whole else ""
        lines.append(f"{paths[0]}{more} ({kind}){kept}: {reason}" if paths[0] else f"{kind}: {reason}")
    return lines


def _check(model: Any) -> None:
    check_module(model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"model: got {type(model).__name__}; capture the module in it (model.module), then wrap"
        )
    if is_compiled(model):
        raise ValueError(
            "model: got a compiled module; capture the one in it (model._orig_mod), then compile"
        )
    if any(is_dtensor(tensor) for tensor in model.parameters()):
        raise ValueError(
            "model: its parameters are split over processes; capture it before fully_shard (fxprune.analyze"
            " takes it as it is, and so does fxprune.apply with returns='inplace')"
        )
    tensors = {name for name, value in vars(model).items() if isinstance(value, Tensor)}
    parts = {*model._parameters, *model._buffers, *model._modules, *tensors}
    if not isinstance(model, fx.GraphModule) and (taken := sorted(parts & reserved_names())):
        raise CaptureError(
            f"{type(model).__name__} cannot be captured: {taken[0]!r} is one of its parts and an attribute "
            "of torch.fx.GraphModule; give the part another name, or put the model into a module"
        )
    lazy = [name for name, tensor in model.named_parameters() if is_lazy(tensor)]
    if lazy:
        raise ValueError(f"model: {lazy[0]!r} has no shape yet; run the model once before capturing it")


def _shapes(value: Any, examples: dict[int, Tensor] | None = None) -> Any:
    """Arguments with tensors as shapes; ``examples`` gets the numbers of those that hold whole ones."""

    def shape(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        made = meta_like(item)
        if examples is not None and not (item.is_meta or item.is_floating_point() or item.is_complex()):
            examples[id(made)] = item.detach().cpu()
        return made

    return map_structure(shape, value)


def _explained(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: BaseException
) -> ValueError | CaptureError:
    """Is it the inputs or the model? The inputs, if their shapes fail without a trace, too."""
    name = type(model).__name__
    if not isinstance(error, CaptureError):
        try:
            shapes_only(model, args, kwargs)
        except TRACE_ERRORS as own:
            if needs_numbers(own):
                return _refusal(model, error)
            shapes = map_structure(lambda x: list(x.shape) if isinstance(x, Tensor) else x, kwargs or args)
            return InputError(
                f"example_inputs: {name} does not accept {shapes}: {first_line(own)} ({where(own, model)}); "
                "pass inputs that it runs on"
            )
    return _refusal(model, error)


def _refusal(model: nn.Module, error: BaseException) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {first_line(error)} ({where(error, model)}){REMEDY}"
    )
