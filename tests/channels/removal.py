"""Zero the slices of a channel group in a plain model, by the members that a listing names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.channels.listing import ChannelGroup
from fxprune.graph import ChannelGraph


def weight_slices(graph: ChannelGraph, name: str, axis: str | int, indices: tuple[int, ...]) -> Tensor:
    """Mark the entries of a parameter that a member names (bool, of its shape); groups by hand."""
    kernels = graph.kernels[name]
    gone = torch.zeros(kernels.shape, dtype=torch.bool)
    own = kernels.out_space.size // kernels.groups, kernels.in_space.size // kernels.groups
    per_group = own[0] if axis == "out" else own[1]
    whole = kernels.shape[0] // kernels.groups
    for index in indices:
        if (axis == "out") != kernels.transposed:  # the first dimension runs over all groups
            gone[index] = True
        else:
            group = index // per_group
            gone[group * whole : (group + 1) * whole, index % per_group] = True
    return gone


def zero_group(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> None:
    """Set every parameter entry of the group to zero, in place."""
    with torch.no_grad():
        for member in group.members:
            owner, _, leaf = member.parameter.rpartition(".")
            if leaf not in model.get_submodule(owner)._parameters:
                continue
            parameter = model.get_parameter(member.parameter)
            if isinstance(member.axis, int):
                parameter.index_fill_(member.axis, torch.tensor(member.indices), 0.0)
            else:
                gone = weight_slices(graph, member.parameter, member.axis, member.indices)
                parameter.masked_fill_(gone, 0.0)
