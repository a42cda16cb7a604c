"""Carry the state of an optimizer over to the parameters of a smaller network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxprune.capture.errors import check_module
from fxprune.keywords import refuse_unknown
from fxprune.rewrite.compact.constant_branches import is_constant
from fxprune.rewrite.compact.kept import Kept
from fxprune.rewrite.compact.table import Compaction
from fxprune.rewrite.masking.computed import computed_from, computed_weights

__all__ = ["move_optimizer", "remap_optimizer"]


def remap_optimizer(
    optimizer: torch.optim.Optimizer,
    before: nn.Module,
    after: nn.Module,
    **others: NoReturn,
) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters of ``after`` with what is left of the state of ``optimizer``.

    Args:
        optimizer: over parameters of ``before``; it is not changed.
        before: the network that was compacted, by the names that its parameters have.
        after: what :func:`fxprune.compact` made of it.

    Returns:
        An optimizer of the same class, with the same groups and options. State of a parameter's shape
        (momenta) is sliced as the parameter was; biases that are new join the group of their weight, and
        constants that took the place of branches the first group. A weight that was computed (weight
        norm) is a parameter now, without state, in the group of the largest one it was computed from.

    Raises:
        ValueError: ``after`` was not made by ``compact``, or the optimizer has a parameter that ``before``
            lacks.

    Example:
        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:5].zero_(), net[0].bias[:5].zero_()
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> adam.step()
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:5].zero_(), net[0].bias[:5].zero_()
        >>> small = fxprune.compact(net, torch.ones(2, 4))
        >>> smaller = fxprune.remap_optimizer(adam, net, small)
        >>> smaller.state[small.get_parameter("0.weight")]["exp_avg"].shape
        torch.Size([3, 4])
    """
    refuse_unknown(remap_optimizer, others)
    check_module(before, "before")
    table = getattr(after, "meta", {}).get("fxprune", {}).get("compaction")
    if not isinstance(table, Compaction):
        raise ValueError("after: expected what fxprune.compact returned; it has no table of a compaction")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    made = object.__new__(type(optimizer))
    made.__dict__.update(optimizer.__dict__)
    made.param_groups, made.state = _carried(optimizer, before, after, table.kept)
    return made


def move_optimizer(
    optimizer: torch.optim.Optimizer, before: nn.Module, after: nn.Module, kept: Mapping[str, Kept]
) -> None:
    """Make an optimizer one of the parameters of ``after``, in place, as :func:`remap_optimizer` does.

    ``kept``: by parameter that got smaller, what is left of it.
    """
    optimizer.param_groups, optimizer.state = _carried(optimizer, before, after, kept)


def _carried(
    optimizer: torch.optim.Optimizer, before: nn.Module, after: nn.Module, kept: Mapping[str, Kept]
) -> tuple[list[dict[str, Any]], defaultdict[Tensor, Any]]:
    """The groups and the state of an optimizer, of the parameters of ``after`` instead of ``before``."""
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    new = dict(after.named_parameters(remove_duplicate=False))
    # Compaction makes a computed weight a plain one. It takes the place of the largest of its parameters that
    # are trained: a direction of its shape, say, whose weights decay, and no length.
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    computed = {}
    for name, place in computed_weights(before).items():
        parts = [part for part in computed_from(*place) if id(part) in trained]
        if parts:
            computed[id(max(parts, key=Tensor.numel))] = name
    groups, state = [], defaultdict[Tensor, Any](dict)
    for number, group in enumerate(optimizer.param_groups):
        parameters = []
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"before: it lacks a parameter of the optimizer's group {number}; pass the network that"
                    " the optimizer trains"
                )
            name = names[id(parameter)]
            if computed.get(id(parameter)) in new and name not in new:
                parameters.append(new[computed[id(parameter)]])
            if name not in new:
                continue
            parameters.append(new[name])
            if parameter in optimizer.state:
                own = kept.get(name)
                known = optimizer.state[parameter]
                state[new[name]] = {key: _sliced(value, parameter, own) for key, value in known.items()}
            bias = f"{name.rpartition('.')[0]}.bias" if "." in name else "bias"
            if name.rpartition(".")[2] == "weight" and bias in new and bias not in names.values():
                parameters.append(new[bias])
        groups.append({**group, "params": parameters})
    if groups:  # what took the place of branches whose parameters were trained
        groups[0]["params"] += [
            new[name] for name in sorted(new.keys() - set(names.values())) if is_constant(name)
        ]
    return groups, state


def _sliced(value: Any, parameter: Tensor, kept: Kept | None) -> Any:
    """A copy of one entry of an optimizer's state, without what the parameter has lost."""
    if not isinstance(value, Tensor):
        return value
    if kept is None or value.shape != parameter.shape:
        return value.clone()
    return kept.take(value)
