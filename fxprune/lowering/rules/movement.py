"""Data movement: ops that copy entries about and compute nothing. One rule serves them all.

The op itself, run on a tensor of integer labels, tells where every entry went; so nothing is known here about
what a reshape or a pixel shuffle does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import ir
from fxprune.graph.tensor_function import PREVIOUS, Operand, TensorFunction
from fxprune.lowering.constant import Constant
from fxprune.lowering.literals import literals_of
from fxprune.lowering.rules.choices import (
    any_along,
    any_of,
    any_row,
    numbers,
    shut_out,
    written_anywhere,
)  # fmt: skip
from fxprune.lowering.rules.live_sizes import plain_slices
from fxprune.lowering.rules.pointwise import present
from fxprune.lowering.rules.table import Context, RuleTable, Unknown, substitute, tensors_in
from fxprune.torch_private import nn_functions

__all__ = ["MOVES", "REARRANGES", "SHAPED_LIKE", "function_of", "is_data", "table"]

table = RuleTable()

_METHODS = """
    reshape view flatten unflatten permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze
    expand repeat chunk split split_with_sizes tensor_split unbind narrow select index_select roll flip fliplr
    flipud rot90 tile repeat_interleave gather diagonal tril triu reshape_as view_as expand_as broadcast_to t
    take_along_dim squeeze_ unsqueeze_ t_ transpose_ ravel hsplit vsplit unfold tril_ triu_ diag_embed numpy_T
    adjoint as_strided
""".split()
_FUNCTIONS = """
    reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze chunk
    split split_with_sizes tensor_split unbind narrow select index_select roll flip fliplr flipud rot90 tile
    repeat_interleave gather diagonal tril triu broadcast_to t take_along_dim cat concat concatenate stack
    hstack vstack pixel_shuffle pixel_unshuffle channel_shuffle ravel hsplit vsplit dstack column_stack
    atleast_1d native_channel_shuffle diag_embed adjoint constant_pad_nd meshgrid block_diag diag
    broadcast_tensors as_strided
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
]
_PADS = (
    F.pad,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    torch.constant_pad_nd,
)

_PAD_MODES: dict[str, tuple[type[nn.Module], ...]] = {
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}

MOVES: set[Any] = {
    *_METHODS,
    *(getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)),
    *_MODULES,
    F.pad,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    nn_functions.pad_sequence,
    torch.fft.fftshift,
    torch.fft.ifftshift,
    operator.getitem,
    operator.setitem,
    getattr,  # x.T, x.mT, x.data
}
REARRANGES = MOVES - {
    "expand", "expand_as", "broadcast_to", torch.broadcast_to, torch.broadcast_tensors, torch.meshgrid,
}  # fmt: skip
"""These do not repeat one entry along an axis as broadcasting does."""
INDEXED = {
    operator.getitem, "gather", torch.gather, "index_select", torch.index_select, "take_along_dim",
    torch.take_along_dim,
}  # fmt: skip
"""Their first tensor is moved, any other is an index."""
SHAPED_LIKE = {"reshape_as": "reshape", "view_as": "view", "expand_as": "expand"}
"""Methods whose second tensor gives its shape alone, and the method that takes that shape."""


def is_data(x: ir.Value | Constant) -> bool:
    """Index tensors are read for their numbers, all others are moved."""
    return isinstance(x, ir.Value) or x.dtype.is_floating_point or x.dtype.is_complex


def _numbers(x: Constant) -> Tensor:
    number = x.numbers()
    if number is None:
        raise Unknown("the numbers of an index tensor are not known (on the meta device?)")
    return number


def _has_unknown_index(args: Any, kwargs: Any) -> bool:
    constants = (x for x in tensors_in((args, kwargs)) if isinstance(x, Constant))
    return any(x.numbers() is None for x in constants if not is_data(x))


def set_item(x: Tensor, index: Any, new: Any) -> Tensor:
    """Return ``x`` after ``x[index] = new``."""
    changed = x.clone()
    changed[index] = new
    return changed


def _functional(module: nn.Module) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function that a module of ``MOVES`` calls, with its arguments after the tensor."""
    m: Any = module
    match m:
        case nn.Flatten():
            return torch.flatten, (m.start_dim, m.end_dim), {}
        case nn.Unflatten():
            return torch.unflatten, (m.dim, tuple(m.unflattened_size)), {}
        case nn.PixelShuffle():
            return F.pixel_shuffle, (m.upscale_factor,), {}
        case nn.PixelUnshuffle():
            return F.pixel_unshuffle, (m.downscale_factor,), {}
        case nn.ChannelShuffle():
            return F.channel_shuffle, (m.groups,), {}
    padding = [int(amount) for amount in m.padding]
    for mode, kinds in _PAD_MODES.items():
        if isinstance(m, kinds):
            return F.pad, (padding,), {"mode": mode}
    return F.pad, (padding,), {"value": getattr(m, "value", 0.0)}


def function_of(
    target: Any, module: nn.Module | None, args: Any, kwargs: Any, operand: Callable[[Any], Any]
) -> TensorFunction:
    """Describe an op of ``MOVES`` as a function of tensors.

    Args:
        target: the fx node's target, or the class of its module.
        module: the module of a ``call_module``; its function stands for it.
        args, kwargs: of the call, with values and constants for tensors.
        operand: what stands for each of them: an :class:`Operand`, or a tensor of numbers.
    """
    args, kwargs = substitute(args, operand), substitute(kwargs, operand)
    if module is not None:
        target, more, named = _functional(module)
        return TensorFunction.of(target, *args, *more, **kwargs, **named)
    if target is operator.setitem:
        x, index, new = args
        if not isinstance(new, Operand):  # numbers that are written: labels of zeros and of constants
            new = (new != 0).double() if isinstance(new, Tensor) else float(new != 0)
        return TensorFunction.of(set_item, x, index, new)
    return TensorFunction.of(target, *args, **kwargs)


def _move_of(context: Context, args: Any, kwargs: Any) -> TensorFunction:
    """The op as a function of its data operands alone, in the order of :func:`tensors_in`."""
    count = sum(1 for x in tensors_in((args, kwargs)) if is_data(x))
    places = iter(range(count))

    def operand(x: ir.Value | Constant) -> Operand | Tensor:
        if isinstance(x, Constant) and not is_data(x):
            return _numbers(x)
        place = next(places) if count > 1 else -1
        return Operand(place, isinstance(x, Constant) and x.zero)

    return function_of(context.target, context.module, args, kwargs, operand)


def _padding(
    context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int], bool] | None:
    """Amounts of a constant padding (as F.pad takes them) and whether with zeros; ``None`` for other ops."""
    if context.target not in _PADS:
        return None
    if context.target is torch.constant_pad_nd:
        amounts, mode, value = args[1], "constant", args[2] if len(args) > 2 else kwargs.get("value", 0)
    elif context.module is None:
        amounts = args[1] if len(args) > 1 else kwargs["pad"]
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        value = args[3] if len(args) > 3 else kwargs.get("value")
    else:
        amounts, mode, value = context.module.padding, "constant", getattr(context.module, "value", 0)
    return ([int(amount) for amount in amounts], value in (None, 0, 0.0)) if mode == "constant" else None


def _image_pads(rank: int, amounts: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Image axes that grow by zeros, with (before, after).

    Images are (batch, channel, positions...), or (batch, rows, columns, channel) if rows and columns both
    grow.
    """
    pairs = {rank - 1 - i // 2: (amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)}
    grown = {dim: pair for dim, pair in pairs.items() if pair != (0, 0)}
    if not grown or min(amounts) < 0:
        return {}
    channels_last = rank >= 4 and {1, 2} <= set(grown) and rank - 1 not in grown
    return grown if channels_last or not set(grown) & {0, 1} else {}


@table.rule(*MOVES)
def move(context: Context, *args: Any, **kwargs: Any) -> Any:
    """``y[i] = x[map(i)]``: the map is read off a run on labels."""
    if context.target is operator.getitem and not isinstance(args[0], (ir.Value, Constant)):
        return operator.getitem(args[0], args[1])
    build = context.build
    if context.target is operator.getitem:
        args = (args[0], plain_slices(args[1], args[0].shape, context.shape))
    if context.target in _PADS:
        args = (args[0], *substitute(args[1:], lambda x: int(_numbers(x)) if isinstance(x, Constant) else x))
    order = (
        _memory_order(context.node.args[0]) if context.target in ("as_strided", torch.as_strided) else None
    )
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):  # x.view(torch.int32)
        raise Unknown("memory seen as another type")
    if context.target is getattr and args[1] in ("real", "imag", "data"):
        return build.affine(build.materialise(args[0]))
    if context.target in SHAPED_LIKE and isinstance(args[0], Constant) and not is_data(args[0]):  # an index
        like = TensorFunction.of(SHAPED_LIKE[context.target], PREVIOUS, tuple(context.shape))
        return args[0].moved(like, tuple(context.shape))
    if context.target == "expand_as" and not getattr(args[0], "live", False):
        context, args = replace(context, target="expand"), (args[0], tuple(context.shape))  # stays a constant
    operands = [x for x in tensors_in((args, kwargs)) if is_data(x)]
    if any(isinstance(x, ir.Value) for x in tensors_in(_indices(context.target, args, kwargs))):
        return _chosen(context, args, kwargs)
    values = [build.materialise(x) for x in operands]
    if not any(value.live for value in values) and _has_unknown_index(args, kwargs):
        # Entries of a table, picked by numbers that are not known (the meta device): no path, and perhaps
        # present; its numbers tell nothing, and are not to be computed with.
        return replace(present(context.shape), is_learnt=True)
    run, pads = _move_of(context, args, kwargs), {}
    padding = _padding(context, args, kwargs)
    if padding is not None:
        amounts, zeros = padding
        pads = _image_pads(len(values[0].shape), amounts) if zeros else {}
        fill = 0.0 if zeros else 1.0  # the label of a constant
        run = TensorFunction.of(F.pad, PREVIOUS, amounts, value=fill)
    if order is not None:
        run = TensorFunction.of("permute", PREVIOUS, order).then("contiguous", PREVIOUS).followed_by(run)
    moved = _outputs(context, run, values, context.result, pads)
    if values and values[0].index in build.squares:
        build.squares.update(x.index for x in tensors_in(moved) if isinstance(x, ir.Value))
    return moved


@table.rule(torch.index_put, "index_put", "index_put_")
def put(context: Context, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """``y = x``, with ``y[indices] = values``, or with these added."""
    if accumulate:
        return written_anywhere(context, x, tuple(indices), values)
    return move(replace(context, target=operator.setitem), x, tuple(indices), values)


def _chosen(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ir.Value:
    """Data movement by an index that depends on the input."""
    if context.target is operator.setitem:
        return written_anywhere(context, *args)
    if context.target is operator.getitem:
        return any_of(context, *args)
    rest = [a for a in args[1:] if type(a) is int]
    dim = kwargs.get("dim", kwargs.get("axis", rest[0] if rest else None))
    if dim is None:
        raise Unknown("an index tensor depends on the input")
    if context.target in ("index_select", torch.index_select):
        return any_row(context, args[0], dim, context.shape)
    x, shape = context.build.materialise(args[0]), list(context.shape)
    cut = [slice(None) if d == dim % len(shape) else slice(size) for d, size in enumerate(shape)]
    own = [x.shape[d] if d == dim % len(shape) else size for d, size in enumerate(shape)]
    if own != list(x.shape):
        x = context.build.gather(TensorFunction.of(operator.getitem, PREVIOUS, tuple(cut)), [x], own)
    return any_along(context, x, (dim,), shape)


def _memory_order(node: Any) -> list[int]:
    """The axes of a tensor in the order in which its memory has them."""
    val = node.meta["val"]
    order = sorted(range(val.dim()), key=lambda axis: -val.stride(axis))
    if val.storage_offset() or not val.permute(order).is_contiguous():
        raise Unknown("memory that has gaps, or is seen twice")
    return order


def _indices(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that say where, by their place: a value may be its own index, as in ``x[x < 0]``."""
    if target is operator.setitem:
        return args[1]
    return (args[1:], kwargs) if target in INDEXED else ()


def _outputs(
    context: Context,
    run: TensorFunction,
    values: list[ir.Value],
    result: Any,
    pads: dict[int, tuple[int, int]],
    part: int | None = None,
) -> Any:
    build = context.build
    if isinstance(result, Tensor) or hasattr(result, "shape"):
        rank = len(values[0].shape)
        literals = tuple(literals_of(context.node, context.module, rank, part))
        return build.gather(run, values, result.shape, pads, literals)
    if isinstance(result, (list, tuple)):
        items = [run.then(operator.getitem, PREVIOUS, i) for i in range(len(result))]
        return type(result)(
            _outputs(context, item, values, r, {}, i)
            for i, (item, r) in enumerate(zip(items, result, strict=True))
        )
    raise Unknown(f"data movement returns {type(result).__name__}")


@table.rule(F.unfold, nn.Unfold)
def unfold(context: Context, x: Any, *args: Any, **kwargs: Any) -> ir.Value:
    """Patches of an image, side by side: zeros around it first."""
    names = ("kernel_size", "dilation", "padding", "stride")
    given = dict(zip(names, args, strict=False)) | kwargs
    if context.module is not None:
        given = {name: getattr(context.module, name) for name in names}
    value, padding = context.build.materialise(x), given.pop("padding", 0)
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    if rows or columns:
        *outer, height, width = value.shape
        shape = (*outer, height + 2 * rows, width + 2 * columns)
        pads = {len(shape) - 2: (rows, rows), len(shape) - 1: (columns, columns)}
        amounts = [columns, columns, rows, rows]
        pad = TensorFunction.of(F.pad, PREVIOUS, amounts)
        value = context.build.gather(pad, [value], shape, pads)
    return context.build.gather(TensorFunction.of(F.unfold, PREVIOUS, **given), [value], context.shape)


@table.rule(torch.where, "where")
def where(context: Context, condition: Any, a: Any = None, b: Any = None) -> Any:
    """Each side where it is chosen; both, where the input chooses. Alone: places, on no path.

    Between constants the choice is all that is left of the input: signs, steps and hard quantisers.
    """
    if a is None:
        return tuple(numbers(context, places) for places in context.result)
    build, shape = context.build, context.shape
    sides = []
    chosen = condition.numbers() if isinstance(condition, Constant) else None
    for side, pick in ((a, True), (b, False)):
        if not isinstance(side, (ir.Value, Constant)):
            if side == 0:
                continue
            side = Constant((), torch.float32, lambda: torch.ones(()))
        value = build.materialise(side)
        if chosen is not None:
            value = build.select(value, chosen.bool() == pick, shape)
        sides.append(value)
    live = any(isinstance(x, ir.Value) and x.live for x in (a, b))
    if isinstance(condition, ir.Value) and condition.live and not live and not shut_out(a, b):
        sides.append(build.map_anew(build.affine(condition, shape), floor=bool(sides)))
    return build.sum(sides, shape)
