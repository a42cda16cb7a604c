"""Give the masks of a model to its averages (EMA, SWA): copies that are written to and no optimiser owns.

A copy of a masked module remembers the module that it was copied from. Whoever averages weights writes to the
copy again and again while the original trains; a snapshot is not written to, and a copy that trains has an
optimiser. From the second change on, a copy counts as an average: it gets the masks of its original
whenever these differ from those it was given last, and its pruned weights become zero.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from fxprune.rewrite.masking.storage import clean, masked_attributes
from fxprune.sharded_types import is_dtensor

IDENTITY = "mask_identity"
"""A plain attribute of masked modules, by which a copy knows its original."""
CHANGES = 2
"""Changes seen before a copy counts as an average; one is what drawing its weights anew looks like."""
LOOKS = 8
"""Steps after a change of masks at which values are compared too: ``.data`` is written to unseen."""

Versions = dict[str, tuple[int, int]]
"""Attribute -> the id of a tensor, and how often it was changed in place."""


@dataclass
class _CopyState:
    """A copy: its original, its weights and masks as last seen, and how many changes were seen.

    ``expected``: the versions of the original's masks; ``looks``: how often values are still to be compared
    since these changed; ``given``: the versions of the masks that the copy was given.
    """

    original: str
    weights: Versions = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: Versions = field(default_factory=dict)
    given: Versions = field(default_factory=dict)
    expected: Versions = field(default_factory=dict)
    looks: int = 0
    changes: int = 0


_copies: weakref.WeakKeyDictionary[nn.Module, _CopyState] = weakref.WeakKeyDictionary()


def identify(module: nn.Module) -> None:
    """Give a module that is being masked an identity; one that it has already stays."""
    module.__dict__.setdefault(IDENTITY, uuid.uuid4().hex)


def watch(module: nn.Module) -> None:
    """Watch a copy that was just made for changes by others than an optimiser."""
    original = module.__dict__.get(IDENTITY)
    module.__dict__[IDENTITY] = uuid.uuid4().hex
    if original is not None:
        _copies[module] = _CopyState(original)
        note(module)


def forget(module: nn.Module) -> None:
    """Watch a copy no longer, for an optimiser owns it or it has no masks any more."""
    _copies.pop(module, None)


def note(module: nn.Module) -> None:
    """Take the present weights and masks of a copy as seen: the library itself wrote them."""
    seen = _copies.get(module)
    if seen is not None:
        seen.weights, seen.masks = _versions(module)
        seen.sums = _sums(module)


def mask_averages(originals: Iterable[nn.Module]) -> None:
    """Look at the copies of ``originals``, and give their masks to those that are averages."""
    if not _copies:
        return
    by_identity = {module.__dict__.get(IDENTITY): module for module in originals}
    for copy, seen in list(_copies.items()):
        original = by_identity.get(seen.original)
        if original is None:
            continue
        versions = _versions(original)[1]
        if seen.expected != versions:
            seen.expected, seen.looks = versions, LOOKS
        if seen.changes < CHANGES and _is_changed(copy, seen):
            seen.changes += 1
            note(copy)
        if seen.changes >= CHANGES and seen.given != versions:
            _give(original, copy)
            seen.given = versions


def foreign_masks(module: nn.Module, living: Iterable[nn.Module]) -> Iterator[str]:
    """Yield the attributes of a copy whose mask was overwritten, and not with its original's."""
    seen = _copies.get(module)
    originals = () if seen is None else living
    for original in originals:
        if seen is not None and original.__dict__.get(IDENTITY) == seen.original:
            wanted = {attribute: mask for attribute, _, mask in masked_attributes(original)}
            for attribute, _, mask in masked_attributes(module):
                overwritten = _version(mask) != seen.masks.get(attribute)
                if overwritten and attribute in wanted and not _equal(mask, wanted[attribute]):
                    yield attribute


def _give(original: nn.Module, copy: nn.Module) -> None:
    wanted = {attribute: mask for attribute, _, mask in watched(original)}
    for attribute, _, mask in watched(copy):
        if attribute in wanted:
            mask.copy_(wanted[attribute])
    clean(copy)
    note(copy)


def watched(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Yield what an average writes to: an attribute, a parameter, and the mask of it or of what it makes.

    A mask of a weight that is computed lies behind the parameters of another module, its ``masked_sources``.
    """
    yield from masked_attributes(module)
    for number, source in enumerate(getattr(module, "masked_sources", ())):
        yield f"mask {number}", source, module.mask  # type: ignore[misc]


def _is_changed(copy: nn.Module, seen: _CopyState) -> bool:
    if not seen.weights:  # there were none yet when its watch began
        note(copy)
        return False
    if _versions(copy)[0] != seen.weights:
        return True
    if not seen.looks:
        return False
    seen.looks -= 1
    return any(not _equal(value, seen.sums[name]) for name, value in _sums(copy).items())


def _versions(module: nn.Module) -> tuple[Versions, Versions]:
    found = list(watched(module))
    return (
        {attribute: _version(parameter) for attribute, parameter, _ in found},
        {attribute: _version(mask) for attribute, _, mask in found},
    )


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _sums(module: nn.Module) -> dict[str, torch.Tensor]:
    """Sums of the bits of the parameters; without those that have no values of their own."""
    found = {}
    for attribute, parameter, _ in watched(module):
        data = parameter.data.to_local() if is_dtensor(parameter.data) else parameter.data
        if type(data) is torch.Tensor and not data.is_meta:
            found[attribute] = _sum_of_bits(data)
    return found


def _sum_of_bits(data: torch.Tensor) -> torch.Tensor:
    """A number that changes with any entry: the sum of the words of eight bytes, which wraps around."""
    flat = data.reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = len(flat) // 8
    return flat[: 8 * words].view(torch.int64).sum() + flat[8 * words :].sum()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other.to(one.device))
