"""Make a norm that gets narrower once more of one that did already."""

from __future__ import annotations

from torch import Tensor, nn

from fxprune.capture.narrowed_norms import (
    NARROWED,
    NarrowedGroupNorm,
    NarrowedLayerNorm,
    NarrowedRMSNorm,
)

__all__ = ["NARROWED", "NarrowedGroupNorm", "NarrowedLayerNorm", "NarrowedRMSNorm", "narrower"]


def narrower(norm: nn.Module, total: Tensor, squares: Tensor, left: Tensor | None) -> nn.Module:
    """Return a norm that lost more: what it lost before and the sums of what it loses now.

    ``left``: of a group norm, the groups that are left (bool).
    """
    if isinstance(norm, NarrowedRMSNorm):
        return NarrowedRMSNorm(norm.width, norm.eps, norm.squares + squares)
    assert isinstance(norm, (NarrowedGroupNorm, NarrowedLayerNorm))
    before = norm.total, norm.squares
    if left is not None:
        before = norm.total[left], norm.squares[left]
    return type(norm)(norm.width, norm.eps, before[0] + total, before[1] + squares)
