"""Make channel groups small while a network trains: penalties that a training loop adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.arguments import check_flags
from fxprune.capture import capture_own
from fxprune.capture.errors import check_module
from fxprune.channels.entries import entry_groups
from fxprune.channels.groups import Groups, group_channels
from fxprune.keywords import nearest
from fxprune.lowering import lower
from fxprune.network import inside
from fxprune.request import Exclusion, check_exclude, excluded_parameters, exclusions
from fxprune.rewrite import plain
from fxprune.scoring.complex_weights import squared
from fxprune.training.numbers import fraction, integer, positive

__all__ = ["Regularizer", "regularizer"]

KINDS = ("group-lasso", "group-norm", "greg")
TINY = 1e-12
"""Added to squares, so that the gradient of the norm of a group of zeros is zero."""


@dataclass(eq=False)
class Regularizer:
    """A penalty on the channel groups of a model; see :func:`regularizer`.

    ``factors``: what the penalty of each group is multiplied by now (float64, one for every group).
    ``steps``: how often :meth:`step` was called.
    """

    model: nn.Module
    groups: Groups
    strength: float
    power: int
    renew: Callable[[Regularizer], Tensor]
    factors: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: int = 0

    def __post_init__(self) -> None:
        self._entries = entry_groups(self.groups, self._shapes())
        self.factors = self.renew(self)

    def squares(self) -> Tensor:
        """Return the sum of the squares of each group's parameters, with their gradient.

        These are its rows and columns of weights, and its entries of biases and norms.
        """
        return self._added_up(squared)

    def sizes(self) -> Tensor:
        """Return the number of parameters in each group."""
        return self._added_up(lambda one: torch.ones_like(one, dtype=one.dtype.to_real()))

    def penalty(self) -> Tensor:
        """Return the penalty now, a scalar with a gradient: add it to the loss."""
        squares = self.squares()
        size = squares if self.power == 2 else (squares + TINY).sqrt()
        return self.strength * (self.factors.to(size) * size).sum()

    def add_gradients(self) -> None:
        """Add the gradient of the penalty to the parameters' own: call it between backward and step."""
        own = [p for _, p in self._parameters() if p.requires_grad]
        with torch.enable_grad():
            found = torch.autograd.grad(self.penalty(), own, allow_unused=True)
        for parameter, gradient in zip(own, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def step(self) -> None:
        """Go to the next step of the training: factors are found anew, penalties grow."""
        self.steps += 1
        self.factors = self.renew(self)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        names = [*self.groups.graph.kernels, *self._entries]
        return [(name, self.model.get_parameter(name)) for name in names]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def _added_up(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of a function of the parameters over each group; an entry counts once in each."""
        count, kernels = self.groups.count, self.groups.graph.kernels
        total: Tensor | None = None
        for name, parameter in self._parameters():
            values = of(parameter)
            if name in kernels:
                tables = self.groups.by_weight(name)
                taps = tuple(axis for axis, size in enumerate(tables[0].shape) if axis > 1 and size == 1)
                values = values.sum(taps, keepdim=True) if taps else values
                by_row, by_column = (numbers.expand(values.shape) for numbers in tables)
                every = [by_row, by_column.where(by_column != by_row, -1)]
            else:
                axes = self._entries[name].items()
                every = [
                    numbers.view([-1 if d == axis else 1 for d in range(values.dim())]).expand(values.shape)
                    for axis, numbers in axes
                ]
            for numbers in every:
                index = numbers.where(numbers >= 0, count).flatten().to(values.device)
                start = values.new_zeros(count + 1) if total is None else total
                total = start.index_add(0, index, values.flatten())
        assert total is not None
        return total[:count]


def regularizer(
    kind: str,
    model: nn.Module,
    *,
    example_inputs: Any = None,
    strength: float = 1e-4,
    exclude: Exclusion | Iterable[Exclusion] = (),
    whole_heads: bool = False,
    **options: Any,
) -> Regularizer:
    """Make a penalty that drives whole channel groups of ``model`` towards zero, for a training loop.

    Args:
        kind: "group-lasso": ``strength * sum_g sqrt(n_g) |w_g|`` over groups g of n_g parameters (Yuan & Lin
            2006; for networks Wen et al. 2016, arXiv 1608.03665).
            "group-norm": ``strength * sum_g f_g |w_g|^2`` with factors from 1 for the largest group of a
            family to ``2^alpha`` for its smallest (DepGraph, Fang et al. 2023, arXiv 2301.12900, eq. 4-5);
            option ``alpha`` (4.0). Factors are found anew in every ``step``.
            "greg": ``strength * f / 2 * sum |w_g|^2`` over the smallest groups of every family, ``sparsity``
            (0.5) of them; f grows by 1 every ``every`` (10) steps, up to ``ceiling`` (1000) (GReg-1, Wang et
            al. 2021, arXiv 2012.09243, algorithm 1; there groups are the filters of a layer).
        model: the model that trains, masked or not; it is not changed, and its parameters are not copied.
            After ``Pruner.compact`` the model that trains is another one: make the penalty anew.
        example_inputs, exclude: as for :func:`fxprune.apply`; ``whole_heads``: groups are those of "head".
        strength: the factor of the whole penalty.

    Returns:
        A :class:`Regularizer`: ``penalty()`` for the loss, or ``add_gradients()`` after backward; ``step()``
        after each step.

    Raises:
        TypeError, ValueError: an argument that does not fit; a model without channel groups.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sparse = regularizer("group-lasso", net, example_inputs=torch.ones(2, 4), strength=1e-3)
    >>> loss = net(torch.ones(2, 4)).square().mean() + sparse.penalty()
    >>> loss.backward()
    >>> sparse.step()
    """
    if kind not in KINDS:
        given = f"kind={kind!r}" if isinstance(kind, str) else f"kind: got a {type(kind).__name__}"
        raise ValueError(f"{given}: expected one of {', '.join(map(repr, KINDS))}")
    check_module(model)
    check_flags(whole_heads=whole_heads)
    power, renew = _kind(kind, options)
    groups = _groups(inside(model), example_inputs, exclusions(exclude), whole_heads)
    return Regularizer(inside(model), groups, positive("strength", strength), power, renew)


def _groups(
    model: nn.Module, example_inputs: Any, exclude: tuple[Exclusion, ...], whole_heads: bool
) -> Groups:
    check_exclude(exclude, model)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        source = plain(model)
        graph = lower(capture_own(source, example_inputs))
        fixed = excluded_parameters(exclude, source, graph)
        groups = group_channels(graph, fixed=fixed, whole_heads=whole_heads)
    if not groups.count:
        raise ValueError("model: no channel of it can go, so there is nothing to make small")
    parameters = dict(model.named_parameters())
    computed = next((name for name in graph.kernels if name not in parameters), None)
    if computed is not None:
        raise ValueError(f"model: {computed!r} is computed from others, and cannot be penalised")
    return groups


def _kind(kind: str, options: dict[str, Any]) -> tuple[int, Callable[[Regularizer], Tensor]]:
    """The power of the norm, and the function that finds factors."""
    known: dict[str, dict[str, Any]] = {
        "group-lasso": {},
        "group-norm": {"alpha": 4.0},
        "greg": {"sparsity": 0.5, "every": 10, "ceiling": 1000},
    }
    odd = next((name for name in options if name not in known[kind]), None)
    if odd is not None:
        accepted = [*known[kind], "example_inputs", "strength", "exclude", "whole_heads"]
        near = nearest(odd, accepted, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(accepted)}"
        raise TypeError(f"{kind!r} has no option {odd!r}; {hint}")
    values: dict[str, Any] = {**known[kind], **options}
    if kind == "group-lasso":
        return 1, lambda one: one.sizes().detach().double().sqrt()
    if kind == "group-norm":
        alpha = positive("alpha", values["alpha"])
        return 2, lambda one: _by_size(one, alpha)
    share = fraction("sparsity", values["sparsity"])
    every, ceiling = integer("every", values["every"], 1), integer("ceiling", values["ceiling"], 1)
    chosen: list[Tensor] = []

    def grown(one: Regularizer) -> Tensor:
        if not chosen:
            chosen.append(_smallest(one, share))
        return 0.5 * min(1 + one.steps // every, ceiling) * chosen[0].double()

    return 2, grown


def _by_size(one: Regularizer, alpha: float) -> Tensor:
    """``2^(alpha (max - |w_g|) / (max - min))`` within each family."""
    norms = one.squares().detach().double().cpu().sqrt()
    factors = torch.ones_like(norms)
    for family in torch.unique(one.groups.families).tolist():
        members = one.groups.families == family
        own = norms[members]
        spread = own.max() - own.min()
        if spread > 0:
            factors[members] = 2 ** (alpha * (own.max() - own) / spread)
    return factors


def _smallest(one: Regularizer, share: float) -> Tensor:
    """The smallest groups of every family by their norm (bool), all but one at most."""
    norms = one.squares().detach().double().cpu()
    chosen = torch.zeros(len(norms), dtype=torch.bool)
    for family in torch.unique(one.groups.families).tolist():
        members = (one.groups.families == family).nonzero().flatten()
        number = min(int(share * len(members)), len(members) - 1)
        chosen[members[norms[members].argsort(stable=True)[:number]]] = True
    return chosen
