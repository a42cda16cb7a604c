"""Tell which nodes are norms that can get narrower, and make one of a norm that did already."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxprune.capture.narrowed_norms import (
    NARROWED,
    NarrowedGroupNorm,
    NarrowedLayerNorm,
    NarrowedRMSNorm,
)

__all__ = ["NARROWED", "NarrowedGroupNorm", "NarrowedLayerNorm", "NarrowedRMSNorm", "kind_of", "narrower"]


def kind_of(node: fx.Node) -> str:
    """Return "layer" (also for RMS norms) or "group" for a node that can be narrowed, "" for any other.

    "length": what a node divides by loses nothing with entries that are zero.
    """
    if node.target is F.normalize:
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 2.0)
        return "length" if isinstance(p, (int, float)) and p > 0 else ""
    if node.target is F.cosine_similarity:
        return "length"
    module: object = node.target
    if node.op == "call_module" and isinstance(node.graph.owning_module, nn.Module):
        module = node.graph.owning_module.get_submodule(str(node.target))
    if isinstance(module, nn.CosineSimilarity):
        return "length"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, NarrowedLayerNorm, NarrowedRMSNorm)) or module in (
        F.layer_norm,
        F.rms_norm,
    ):
        return "layer"
    is_group = isinstance(module, (nn.GroupNorm, NarrowedGroupNorm)) or module is F.group_norm
    return "group" if is_group else ""


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
