"""Read checkpoints of masked models, dense ones, and those of other pruning tools, into masked modules.

Understood: a masked model's own checkpoint, a dense one, one of ``torch.nn.utils.prune`` (``weight_orig``
and a float ``weight_mask``), one of ``parametrize`` as torch.ao's sparsifiers write it
(``parametrizations.weight.original`` and ``parametrizations.weight.0.mask``), and the research repositories'
``weight`` with a float ``weight_mask``.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from fxprune.rewrite.masking.storage import SUFFIX, masked_attributes
from fxprune.sharded_types import is_dtensor

DENSE_CHECKPOINT = (
    "the checkpoint has no masks: the model keeps its own, which made weights of the checkpoint zero"
    " ({count} in {name!r}, ...); to load it as dense, set masks of ones first"
)
_warned_for: list[Any] = [None]


def adapt(module: nn.Module, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Rewrite, in ``state_dict``, the entries of the masked parameters of ``module`` (not of its children).

    A parameter without a mask in the checkpoint keeps the mask that it has in the module. ``error_msgs`` is
    the list that one ``load_state_dict`` call passes to all modules: it tells the calls apart, so that a
    dense checkpoint warns once and not once per layer.
    """
    for attribute, _, mask in list(masked_attributes(module)):
        key, mask_key = prefix + attribute, prefix + attribute + SUFFIX
        _rename(state_dict, prefix, attribute)
        if key not in state_dict:
            continue
        own = mask_key not in state_dict
        state_dict[mask_key] = mask if own else state_dict[mask_key] != 0
        weight = _zeroed(state_dict[key], state_dict[mask_key])
        if own and weight is not state_dict[key]:
            _warn_once(error_msgs, key, int((weight != state_dict[key]).sum()))
        state_dict[key] = weight


def _rename(state_dict: dict[str, Any], prefix: str, attribute: str) -> None:
    """Turn the keys of ``prune`` and ``parametrize`` into plain ones; several masks are combined."""
    key = prefix + attribute
    if key + "_orig" in state_dict:
        state_dict[key] = state_dict.pop(key + "_orig")
    original = f"{prefix}parametrizations.{attribute}.original"
    if original in state_dict:
        state_dict[key] = state_dict.pop(original)
        pattern = re.compile(re.escape(f"{prefix}parametrizations.{attribute}.") + r"\d+\.mask")
        for name in [name for name in state_dict if pattern.fullmatch(name)]:
            mask = state_dict.pop(name) != 0
            state_dict[key + SUFFIX] = (state_dict.get(key + SUFFIX, mask) != 0) & mask


def _zeroed(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` with zeros where ``mask`` has them; the same object where it had them already."""
    if is_dtensor(weight) or weight.is_meta or mask.is_meta or weight.shape != mask.shape:
        return weight  # a shard was written by a masked model; a wrong shape is load_state_dict's to report
    dropped = mask.to(weight.device).logical_not()
    with torch.no_grad():
        return weight.masked_fill(dropped, 0.0) if weight[dropped].count_nonzero() else weight


def _warn_once(error_msgs: list[str], name: str, count: int) -> None:
    if _warned_for[0] is not error_msgs:
        _warned_for[0] = error_msgs
        warnings.warn(DENSE_CHECKPOINT.format(name=name, count=count), UserWarning, stacklevel=2)
