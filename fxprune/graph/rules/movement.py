"""Data movement: ops that copy entries about and compute nothing. One rule serves them all.

The op itself, run on a tensor of integer labels, tells where every entry went; so nothing is known here about what a
reshape or a pixel shuffle does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.builder import Constant
from fxprune.graph.rules.table import Context, RuleTable, Unknown, substitute, tensors_in

__all__ = ["MOVES", "table"]

table = RuleTable()

_METHODS = """
    reshape view flatten unflatten permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze expand repeat
    chunk split split_with_sizes tensor_split unbind narrow select index_select roll flip fliplr flipud rot90 tile
    repeat_interleave gather diagonal tril triu reshape_as view_as expand_as broadcast_to t take_along_dim squeeze_
    unsqueeze_ t_ transpose_ ravel hsplit vsplit unfold tril_ triu_ diag_embed numpy_T adjoint
""".split()
_FUNCTIONS = """
    reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze chunk split
    split_with_sizes tensor_split unbind narrow select index_select roll flip fliplr flipud rot90 tile
    repeat_interleave gather diagonal tril triu broadcast_to t take_along_dim cat concat concatenate stack hstack
    vstack pixel_shuffle pixel_unshuffle channel_shuffle ravel hsplit vsplit dstack column_stack atleast_1d
    native_channel_shuffle diag_embed adjoint constant_pad_nd
""".split()
_MODULES = [
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.Unfold,
]
_PADS = (F.pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)

MOVES: set[Any] = {
    *_METHODS,
    *(getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)),
    *_MODULES,
    F.pad,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    F.unfold,
    operator.getitem,
    operator.setitem,
}


def _is_data(x: ir.Value | Constant) -> bool:
    """Index tensors are read for their numbers, all others are moved."""
    return isinstance(x, ir.Value) or x.dtype.is_floating_point or x.dtype.is_complex


def _numbers(x: Constant) -> Tensor:
    try:
        number: Tensor = x.evaluate()
    except (RuntimeError, NotImplementedError) as error:
        raise Unknown(f"index tensor cannot be computed: {error}") from error
    if number.device.type == "meta":
        raise Unknown("index tensor is on the meta device: its numbers are not known")
    return number.cpu()


def _runner(context: Context, args: Any, kwargs: Any) -> Callable[[Sequence[Tensor]], Any]:
    """The op as a function of its data operands alone, in the order of :func:`tensors_in`."""
    target, module = context.target, context.module
    fixed = {id(x): _numbers(x) for x in tensors_in((args, kwargs)) if not _is_data(x)}  # type: ignore[arg-type]
    zeros = {id(x): x for x in tensors_in((args, kwargs)) if isinstance(x, Constant) and x.zero}

    def run(tensors: Sequence[Tensor]) -> Any:
        pending = iter(tensors)

        def operand(x: ir.Value | Constant) -> Tensor:
            if id(x) in fixed:
                return fixed[id(x)]
            tensor = next(pending)
            return torch.zeros_like(tensor) if id(x) in zeros else tensor

        moved_args, moved_kwargs = substitute(args, operand), substitute(kwargs, operand)
        if module is not None:
            return module(*moved_args, **moved_kwargs)
        if target is operator.setitem:
            changed = moved_args[0].clone()
            changed[moved_args[1]] = moved_args[2]
            return changed
        if isinstance(target, str):
            return getattr(moved_args[0], target)(*moved_args[1:], **moved_kwargs)
        return target(*moved_args, **moved_kwargs)

    return run


def _zero_pads(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """Axes of a zero padding, with (before, after); empty for anything else."""
    if context.target not in _PADS:
        return {}
    if context.module is None:
        amounts = args[1] if len(args) > 1 else kwargs["pad"]
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        value = args[3] if len(args) > 3 else kwargs.get("value")
    else:
        amounts, mode, value = context.module.padding, "constant", getattr(context.module, "value", 0)
    if mode != "constant" or value not in (None, 0, 0.0):
        return {}
    rank = len(args[0].shape)
    pairs = [(int(amounts[i]), int(amounts[i + 1])) for i in range(0, len(amounts), 2)]
    return {rank - 1 - i: pair for i, pair in enumerate(pairs) if pair != (0, 0)}


@table.rule(*MOVES)
def move(context: Context, *args: Any, **kwargs: Any) -> Any:
    """``y[i] = x[map(i)]``: the map is read off a run on labels."""
    if context.target is operator.getitem and isinstance(args[0], (list, tuple, dict)):
        return args[0][args[1]]
    if context.target is operator.getitem and not isinstance(args[0], (ir.Value, Constant)):
        return operator.getitem(args[0], args[1])
    build = context.build
    operands = [x for x in tensors_in((args, kwargs)) if _is_data(x)]
    if any(isinstance(x, ir.Value) and not _is_moved(context, x, args) for x in operands):
        raise Unknown("an index tensor depends on the input")
    values = [build.materialise(x) for x in operands]
    run = _runner(context, args, kwargs)
    pads = _zero_pads(context, args, kwargs)
    return _outputs(context, run, values, context.result, pads)


def _is_moved(context: Context, x: ir.Value, args: tuple[Any, ...]) -> bool:
    """False for a value that serves as an index."""
    if context.target in (operator.getitem, "gather", torch.gather, "index_select", torch.index_select):
        return x is args[0]
    if context.target is operator.setitem:
        return x is args[0] or x is args[2]
    return True


def _outputs(
    context: Context,
    run: Callable[[Sequence[Tensor]], Any],
    values: list[ir.Value],
    result: Any,
    pads: dict[int, tuple[int, int]],
) -> Any:
    build = context.build
    if isinstance(result, Tensor) or hasattr(result, "shape"):
        return build.gather(run, values, result.shape, pads)
    if isinstance(result, (list, tuple)):

        def item(i: int) -> Callable[[Sequence[Tensor]], Any]:
            return lambda tensors: run(tensors)[i]

        return type(result)(_outputs(context, item(i), values, r, {}) for i, r in enumerate(result))
    raise Unknown(f"data movement returns {type(result).__name__}")


@table.rule("new_zeros", "zero_", torch.zeros_like)
def zeros(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """A tensor of zeros: present nowhere until something is written into it."""
    shape = context.shape
    return Constant(shape, torch.float32, lambda: torch.zeros(shape), zero=True)


@table.rule("new_ones", "new_full", "new_empty", "new_tensor", torch.ones_like, torch.full_like, torch.empty_like)
@table.rule(torch.rand_like, torch.randn_like, "fill_")
def constants(context: Context, x: Any, *args: Any, **kwargs: Any) -> Constant:
    """Present everywhere, on no path."""
    shape = context.shape
    return Constant(shape, torch.float32, lambda: torch.ones(shape))


@table.rule(F.fold, nn.Fold)
def fold(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """Overlapping patches added up: every output entry reaches back to all patches of its channel."""
    raise Unknown("fold adds overlapping patches")


@table.rule(torch.where)
def where(context: Context, condition: Any, a: Any, b: Any) -> ir.Value:
    """Either side may pass: paths of both."""
    values = [x for x in (a, b) if isinstance(x, ir.Value)]
    summed = context.build.sum(values, context.shape) if values else context.build.source(context.shape, live=False)
    return summed
