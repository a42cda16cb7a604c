"""List the channel groups of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import fx, nn

from fxprune.arguments import check_flags
from fxprune.capture import calls_whole, capture, in_shell
from fxprune.capture.errors import check_module
from fxprune.capture.shell import PREFIX
from fxprune.channels.groups import group_channels
from fxprune.channels.listing import GroupTable, list_groups
from fxprune.keywords import refuse_unknown
from fxprune.lowering import Rules, lower
from fxprune.request import Exclusion, check_exclude, excluded_parameters, exclusions
from fxprune.rewrite import plain
from fxprune.rewrite.masking.computed import settled

__all__ = ["channel_groups"]


def channel_groups(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    whole_heads: bool = False,
    exclude: Exclusion | Iterable[Exclusion] = (),
    rules: Rules | None = None,
    **others: NoReturn,
) -> GroupTable:
    """List the channel groups of a model: the smallest sets of channels that can be removed together.

    Args:
        model: any module, pruned or not; it is not changed.
        example_inputs: as in :func:`fxprune.apply`; not needed for what ``apply`` or ``capture`` returned.
        whole_heads: attention loses whole heads (``granularity="head"``), not equally many channels of each.
        exclude: as in :func:`fxprune.apply`: layers whose channels, with all that they meet, stay.
        rules: op rules of your own, as for :func:`fxprune.lower`.

    Returns:
        A sequence of :class:`ChannelGroup`: ``id``, ``size`` (output channels in it), ``members`` (parameter,
        axis, indices), ``parameters`` and ``macs`` that go with it alone, and the ``reason`` if it must stay.
        ``print`` shows groups of the same make on one line.

    Raises:
        TypeError, ValueError: ``model`` is no module, its inputs are not known, or ``exclude`` names nothing.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> groups = fxprune.channel_groups(net, torch.ones(2, 4))
        >>> print(groups)
        ids             groups size  parameters          MACs  members
        0-7                  8    1           7             6  0.weight out, 2.weight in, 0.bias dim 0
        8-9                  2    1           9             8  2.weight out, 2.bias dim 0  stays: output: \
an output of the network
        10 groups, 8 of which can go
        >>> groups[3].members[1]
        ChannelSlice(parameter='2.weight', axis='in', indices=(3,))
    """
    refuse_unknown(channel_groups, others)
    check_flags(whole_heads=whole_heads)
    check_module(model)
    entries = exclusions(exclude)
    check_exclude(entries, model)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        source = settled(plain(model))  # computed weights have channels like any other
        has_shapes = isinstance(source, fx.GraphModule) and all(
            "val" in node.meta for node in source.graph.nodes
        )
        known = source if isinstance(source, fx.GraphModule) and has_shapes else None
        gm = known if known is not None and example_inputs is None else capture(source, example_inputs)
        if calls_whole(gm, source):
            source = in_shell(source)
            entries = tuple(PREFIX + entry if isinstance(entry, str) else entry for entry in entries)
        graph = lower(gm, rules=rules)
        fixed = excluded_parameters(entries, source, graph)
        groups = group_channels(graph, fixed=fixed, whole_heads=whole_heads)
        return list_groups(groups, dict(gm.named_parameters()), dict(gm.named_buffers()))
