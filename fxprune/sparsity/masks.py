"""Masks: one bool tensor per prunable parameter, ``True`` where the weight is kept.

Sets of masks are plain dicts; here are their counts, densities, and the errors about wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy
import torch
from torch import nn

Masks = dict[str, torch.Tensor]
"""Parameter name in the original model -> bool tensor of the parameter's shape, ``True`` = kept."""


def dense(weights: Mapping[str, torch.Tensor]) -> Masks:
    """All-kept masks for ``weights``, in their order, shapes and devices.

    >>> dense({"fc.weight": torch.zeros(1, 2)})
    {'fc.weight': tensor([[True, True]])}
    """
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def nonzeros(model: nn.Module, names: Iterable[str]) -> Masks:
    """Return masks of the weights that are not zero, of those parameters that have values on this device.

    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[0.0, 3.0]])
    >>> nonzeros(layer, ["weight"])
    {'weight': tensor([[False,  True]])}
    """
    parameters = {name: model.get_parameter(name).detach() for name in names}
    return {name: weight != 0 for name, weight in parameters.items() if not weight.is_meta}


def validate(
    masks: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], *, whole: bool = True
) -> None:
    """Raises unless ``masks`` fits ``shapes`` (name -> shape); with ``whole=False`` names may be missing.

    Errors: ``TypeError`` for a value that is not a bool tensor, ``ValueError`` for a wrong name or shape.
    """
    for name, mask in masks.items():
        if name not in shapes:
            raise ValueError(f"masks: no prunable parameter {name!r}; there are {_some(shapes)}")
        if not isinstance(mask, torch.Tensor):
            raise TypeError(
                f"masks[{name!r}] is a {type(mask).__name__}, expected a bool tensor (True = kept)"
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"masks[{name!r}] has dtype {mask.dtype}, expected torch.bool (True = kept)")
        if tuple(mask.shape) != tuple(shapes[name]):
            raise ValueError(
                f"masks[{name!r}] has shape {tuple(mask.shape)}, the parameter has {tuple(shapes[name])}"
            )
    missing = [name for name in shapes if name not in masks]
    if whole and missing:
        raise ValueError(f"masks: nothing given for {_some(missing)}; every prunable parameter needs a mask")


def is_full(mask: torch.Tensor) -> bool:
    """Return whether a mask keeps all its weights.

    >>> is_full(torch.tensor([True, True])), is_full(torch.tensor([True, False]))
    (True, False)
    """
    # The least of bytes is found many times faster than the conjunction of bits.
    return mask.numel() == 0 or bool(mask.view(torch.uint8).amin())


def is_empty(mask: torch.Tensor) -> bool:
    """Return whether a mask keeps no weight.

    >>> is_empty(torch.tensor([False, False])), is_empty(torch.tensor([True, False]))
    (True, False)
    """
    return mask.numel() == 0 or not bool(mask.view(torch.uint8).amax())


def kept(masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Number of weights kept in each parameter, with one synchronisation for all of them.

    >>> kept({"a": torch.tensor([True, False]), "b": torch.tensor([[True]])})
    {'a': 1, 'b': 1}
    """
    return dict(zip(masks, integers([number_kept(mask) for mask in masks.values()]), strict=True))


def number_kept(mask: torch.Tensor) -> int | torch.Tensor:
    """Number of weights that a mask keeps; of one on a device a tensor, so that nobody waits for it.

    >>> number_kept(torch.tensor([True, False, True]))
    2
    """
    if type(mask) is torch.Tensor and mask.is_cpu:
        return int(numpy.count_nonzero(mask.numpy()))  # several times faster than that of PyTorch
    return mask.count_nonzero()


def integers(numbers: Sequence[int | torch.Tensor]) -> list[int]:
    """Bring numbers from their devices, with one synchronisation for all of them.

    >>> integers([2, torch.tensor(3)])
    [2, 3]
    """
    tensors = [number for number in numbers if isinstance(number, torch.Tensor)]
    found = iter(torch.stack([x.to(tensors[0].device) for x in tensors]).tolist() if tensors else ())
    return [next(found) if isinstance(number, torch.Tensor) else number for number in numbers]


def total(masks: Mapping[str, torch.Tensor]) -> int:
    """Number of weights kept over all parameters."""
    return sum(kept(masks).values())


def density(masks: Mapping[str, torch.Tensor]) -> float:
    """Fraction of the weights kept over all parameters (1.0 when there are none)."""
    size = sum(mask.numel() for mask in masks.values())
    return total(masks) / size if size else 1.0


def is_subset(inner: Mapping[str, torch.Tensor], outer: Mapping[str, torch.Tensor]) -> bool:
    """Whether every weight that ``inner`` keeps is kept by ``outer`` too (same names, same shapes)."""
    return inner.keys() == outer.keys() and all(
        is_full(outer[name]) or is_empty(mask & ~outer[name]) for name, mask in inner.items()
    )


def _some(names: Mapping[str, object] | list[str], limit: int = 4) -> str:
    """The first few names, for an error of one line."""
    listed = ", ".join(repr(name) for name in list(names)[:limit])
    rest = len(names) - limit
    return f"{listed} and {rest} more" if rest > 0 else listed or "none"
