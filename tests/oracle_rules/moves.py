"""Operations that move data: the same function on the values and on the paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from oracle_rules.duals import MOVES, Dual, Setting, dual, linear_map, paths_of, rule, spelling

_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack"}


def move(setting: Setting, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an index map."""
    duals = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is Dual]
    live = any(leaf.paths is not None for leaf in duals)
    join = spelling(func)[0] in _JOINS

    def on(part: Callable[[Dual], Tensor]) -> Any:
        def pick(leaf: Any) -> Any:
            if type(leaf) is Dual:
                return part(leaf)
            return part(dual(setting, leaf)) if join and isinstance(leaf, Tensor) else leaf

        changed, options = tree_map(pick, (args, kwargs))
        return func(*changed, **options)

    values = on(lambda leaf: leaf.value.detach() if live else leaf.value)
    paths = on(paths_of) if live else None
    first = args[0] if type(args[0]) is Dual else None

    def wrap(value: Tensor, path: Tensor | None) -> Dual:
        result = Dual.make(value, path)
        if first is None:
            return result
        result.square = first.square
        shared = value.untyped_storage().data_ptr() == first.value.untyped_storage().data_ptr()
        return result.seen_through(first) if shared else result

    if isinstance(values, Tensor):
        return wrap(values, paths)
    pairs = zip(values, paths if live else [None] * len(values), strict=True)
    return type(values)(wrap(value, path) for value, path in pairs)


for _name in _JOINS | set(
    """reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze unsqueeze
    expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile chunk split
    split_with_sizes unsafe_split unsafe_chunk tensor_split hsplit vsplit dsplit unbind narrow select
    index_select gather take_along_dim masked_select __getitem__ roll flip fliplr flipud rot90 pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle reshape_as T mT H mH t adjoint diagonal diag_embed
    ravel tril triu atleast_1d atleast_2d atleast_3d""".split()
):
    MOVES[_name] = move


@rule("view")
def _view(setting: Setting, x: Dual, *shape: Any) -> Dual:
    """The patterns need not be contiguous where the tensor of the model is."""
    if isinstance(shape[0], torch.dtype):
        return x
    return move(setting, Tensor.reshape, (x, *shape), {})


@rule("view_as")
def _view_as(setting: Setting, x: Dual, other: Tensor) -> Dual:
    return _view(setting, x, tuple(other.shape))


@rule("__iter__")
def _iterate(setting: Setting, x: Dual) -> Any:
    return iter(move(setting, torch.unbind, (x,), {}))


def tuple_of(value: Any, n: int) -> tuple[int, ...]:
    """An integer, or one or n integers, as n integers."""
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)


def extend(t: Tensor, dim: int, left: int, right: int, circular: bool) -> Tensor:
    """Pad one dimension with zeros, or periodically; negative amounts crop."""
    if left == right == 0:
        return t
    if circular:
        return t.index_select(dim, torch.arange(-left, t.shape[dim] + right) % t.shape[dim])
    pads = [0, 0] * t.dim()
    place = 2 * (-1 - dim if dim < 0 else t.dim() - 1 - dim)
    pads[place : place + 2] = [left, right]
    return F.pad(t, pads)


def wrap_around(t: Tensor, dim: int, left: int, size: int, circular: bool) -> Tensor:
    """Entries `left .. left + size` of one dimension; what is outside is dropped, or added periodically."""
    if not circular:
        return extend(t, dim, -left, left + size - t.shape[dim], False)
    index = (torch.arange(t.shape[dim]) - left) % size
    shape = list(t.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=t.dtype).index_add(dim, index, t)


@rule("unfold")
def _unfold(setting: Setting, x: Dual, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.unfold(dimension, size, step)` on any tensor, `F.unfold(input, kernel_size, ...)` on images."""
    if "dimension" in kwargs or (len(args) == 3 and x.dim() != 4) or (len(args) == 3 and args[0] >= 2):
        return move(setting, Tensor.unfold, (x, *args), kwargs)
    return _patches(setting, x, *args, **kwargs)


@rule("im2col")
def _patches(
    setting: Setting, x: Dual, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Dual:
    rows, columns = tuple_of(padding, 2)

    def on(t: Tensor) -> Tensor:
        t = extend(extend(t, -2, rows, rows, setting.circular), -1, columns, columns, setting.circular)
        return F.unfold(t, kernel_size, dilation, 0, stride)

    return linear_map(setting, x, on)


@rule("fold", "col2im")
def _fold(
    setting: Setting, x: Dual, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0,
    stride: Any = 1,
) -> Dual:  # fmt: skip
    sizes, pads = tuple_of(output_size, 2), tuple_of(padding, 2)
    wide = tuple(size + 2 * pad for size, pad in zip(sizes, pads, strict=True))

    def on(t: Tensor) -> Tensor:
        t = F.fold(t, wide, kernel_size, dilation, 0, stride)
        for dim, pad, size in zip((-2, -1), pads, sizes, strict=True):
            t = wrap_around(t, dim, pad, size, setting.circular)
        return t

    return linear_map(setting, x, on)


@rule("pad", "constant_pad_nd")
def _pad(
    setting: Setting, x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Dual:
    if mode != "constant":
        return move(setting, F.pad, (x, list(pad)), {"mode": mode})
    # An image is padded with zeros; a row of ones (the normaliser of linear attention) is no border.
    circular = setting.circular and not value and _is_spatial(x.dim(), pad) and min(pad) >= 0

    def on(t: Tensor) -> Tensor:
        for place in range(0, len(pad), 2):
            t = extend(t, -1 - place // 2, pad[place], pad[place + 1], circular)
        return t

    result = linear_map(setting, x, on)
    if value:
        result.value = torch.where(on(torch.ones_like(x.value)) > 0, result.value, 1.0)
    return result


def _is_spatial(dims: int, pad: Sequence[int]) -> bool:
    """Channels-first images padded behind the channels, or channels-last ones between batch and channels."""
    padded = {dims - 1 - place // 2 for place in range(0, len(pad), 2) if pad[place] or pad[place + 1]}
    if dims >= 4 and dims - 1 not in padded and 1 in padded:
        return (
            2 in padded
        )  # (batch, height, width, channel); dimension 1 alone is the channels of (b, c, h, w)
    return not padded & {0, 1}
