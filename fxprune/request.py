"""Check what the caller of ``fxprune.apply`` asks for, and hold it as a ``Request``.

Everything that can be said of an argument without looking into the network is said here, before any work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxprune.arguments import check_flags, check_loss
from fxprune.capture.errors import InputError, check_module
from fxprune.capture.module import CapturedModule
from fxprune.capture.shell import PREFIX, renamed
from fxprune.graph import ChannelGraph, ir
from fxprune.keywords import TRAINING_METHODS, unknown_argument
from fxprune.lowering import Rules
from fxprune.lowering.rules.table import own_rules
from fxprune.methods import Method, common_options
from fxprune.methods import names as known_methods
from fxprune.methods import options as options_of
from fxprune.methods import resolve as resolve_method
from fxprune.scoring.forms import (
    check_data,
    check_labels,
    inputs_and_labels,
    is_batch,
    warn_of_two_inputs,
)
from fxprune.scoring.shapes import explain_misfit, inputs_of
from fxprune.sparsity.budget import Allocation, plan
from fxprune.sparsity.granularity import CHANNEL_OPTIONS, NM, Granularity
from fxprune.sparsity.schedule import DensityFunction, OneShot, Schedule, resolve

ARGUMENTS = (
    "sparsity", "example_inputs", "data", "loss_fn", "budget", "granularity", "schedule", "exclude", "seed",
    "device", "progress", "returns", "on_collapse", "rules",
)  # fmt: skip
"""Arguments of :func:`apply` that are no options of methods."""

GENERAL = ("reinit", "micro_batch")
"""Options that every method takes and that ``apply`` itself implements."""

DEFAULT_SPARSITY = 0.9
"""The sparsity where none is asked for; the report then says so."""

Exclusion = str | type[nn.Module]
"""The name of a module or parameter, a pattern of ``fnmatch``, or a module type."""


@dataclass(frozen=True)
class Request:
    """Hold what the caller of :func:`apply` wants, by the names of its arguments.

    ``asked``: whether the caller named the sparsity.
    """

    method: Method
    sparsity: float
    data: Any
    loss_fn: Callable[..., torch.Tensor] | None
    budget: Allocation
    granularity: Granularity
    schedule: str | Schedule | DensityFunction | None
    exclude: tuple[Exclusion, ...]
    seed: int
    device: str | torch.device | None
    returns: str
    on_collapse: str
    reinit: bool = False
    micro_batch: int | None = None
    rules: Rules | None = None
    asked: bool = True

    def check(self, model: nn.Module) -> None:
        """Everything that can be said without looking into the network; raises what :func:`apply` says."""
        check_module(model)
        if self.returns not in ("graph", "module", "inplace"):
            raise ValueError(f"returns={self.returns!r}: expected 'graph', 'module' or 'inplace'")
        if self.on_collapse not in ("warn", "raise", "repair"):
            raise ValueError(f"on_collapse={self.on_collapse!r}: expected 'warn', 'raise' or 'repair'")
        if isinstance(self.loss_fn, type) and issubclass(self.loss_fn, nn.Module):
            name = self.loss_fn.__name__
            raise TypeError(
                f"loss_fn: expected a function of (output, target), got the class {name}; {name}()"
            )
        check_loss(self.loss_fn)
        if getattr(self.granularity, "at_most", None) is not None:
            self._check_limit()
        if self.budget == "owl" and self.data is None:
            raise ValueError("budget='owl': the shares of layers follow from activations; it needs data=...")
        if not isinstance(self.budget, Mapping):
            _check_pattern(self.granularity, self.sparsity)
        _check_seed(self.seed)
        own_rules(self.rules)
        check_flags(reinit=self.reinit)
        if self.reinit and self.method.updates:
            raise ValueError(
                f"reinit=True draws the weights anew that method {self.method.name!r} has found; leave it out"
            )
        if self.micro_batch is not None and (type(self.micro_batch) is not int or self.micro_batch < 1):
            raise ValueError(f"micro_batch={self.micro_batch!r}: expected a number of samples, at least 1")
        resolve(self.schedule, OneShot())
        if self.method.labels and self.loss_fn is None:
            check_labels(self.data)
        if "data" in self.method.needs and not self.method.labels:
            warn_of_two_inputs(self.data)
        if self.data is not None and not is_batch(self.data):
            check_data(self.data)
        self.method.check(data=self.data)
        resolve_device(self.device)
        _plan_ahead(self.budget, self.sparsity, model)
        check_exclude(self.exclude, model)

    def _check_limit(self) -> None:
        """``ValueError`` for other targets beside a cost that may stay."""
        for argument, value, usual in (("sparsity", self.sparsity if self.asked else None, None),
                                       ("budget", self.budget, "global")):  # fmt: skip
            if value != usual:
                raise ValueError(f"at_most: it says what may stay, and {argument}={value!r} too; give one")

    def in_shell(self) -> Request:
        """Return the request for the model in a shell, in which its parts have other names."""
        exclude = tuple(PREFIX + one if isinstance(one, str) else one for one in self.exclude)
        budget = renamed(self.budget) if isinstance(self.budget, Mapping) else self.budget
        grain, options = self.granularity, ("round_to", "min_channels", "max_sparsity")
        by_layer = {name: getattr(grain, name, None) for name in options}
        named = {name: renamed(value) for name, value in by_layer.items() if isinstance(value, Mapping)}
        grain = replace(grain, **named) if named else grain  # type: ignore[type-var]
        return replace(self, exclude=exclude, budget=budget, granularity=grain)

    def excludes(self, model: nn.Module, names: Iterable[str]) -> bool:
        """Whether a parameter, known by any of ``names``, is not to be pruned."""
        return is_excluded(self.exclude, model, names)


def method_of(method: str | Method, given: Mapping[str, Any]) -> Method:
    """Return the method with its options; the error for an unknown one names the argument that was meant."""
    if isinstance(method, str) and method in TRAINING_METHODS:
        raise ValueError(
            f"method={method!r} prunes while a network trains: pruner = fxprune.Pruner(model, {method!r},"
            " total=epochs), then pruner.step(epoch) after each"
        )
    if not isinstance(method, str) or method not in known_methods():
        return resolve_method(method, **given)
    own = options_of(method)
    accepted = [*ARGUMENTS, *own, *common_options(), *GENERAL, *CHANNEL_OPTIONS]
    for name in given:
        if name not in accepted:
            owners = [other for other in known_methods() if name in options_of(other)]
            raise unknown_argument(name, "apply", method, accepted, own, owners)
    return resolve_method(method, **given)


def with_shapes(model: nn.Module, example_inputs: Any, wish: Request) -> tuple[Any, Request]:
    """Return example inputs, taken from the data where there are none, and the request to go on with.

    A captured model remembers its inputs. Raises ``TypeError`` or ``ValueError`` for data in no known form.
    """
    if example_inputs is not None or wish.data is None or isinstance(model, CapturedModule):
        return example_inputs, wish
    inputs, data = inputs_of(wish.data, model)
    return inputs, replace(wish, data=data)


@contextmanager
def blamed_on_data(model: nn.Module, example_inputs: Any, wish: Request) -> Iterator[None]:
    """Let the error for inputs that a model does not accept name ``data``, where it comes from there."""
    try:
        yield
    except InputError as error:
        if example_inputs is not None or wish.data is None:
            raise
        batch = inputs_and_labels(wish.data)[0] if is_batch(wish.data) else inputs_of(wish.data, model)[0]
        text = explain_misfit(batch, model) or str(error).replace("example_inputs", "data", 1)
        raise InputError(text) from error


def default_sparsity(granularity: Granularity) -> float:
    """Return the sparsity that is meant where none is given: 0.9, and that of an N:M pattern itself.

    >>> default_sparsity(NM(2, 4))
    0.5
    """
    return 1 - granularity.n / granularity.m if isinstance(granularity, NM) else DEFAULT_SPARSITY


def _check_pattern(granularity: Granularity, sparsity: float) -> None:
    """Say what becomes of an N:M pattern under a sparsity that is not its own."""
    own = default_sparsity(granularity)
    if isinstance(granularity, NM) and isinstance(sparsity, float) and own + 1e-9 < sparsity < 1:
        pattern = f"{granularity.n}:{granularity.m}"
        warnings.warn(
            f"sparsity={sparsity}: more than the {own:.4g} of {pattern}, so many groups keep fewer than"
            f" {granularity.n} of {granularity.m}; leave sparsity out for {pattern} in full",
            stacklevel=4,  # the line that called apply
        )


def _parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def check_exclude(exclude: Iterable[Exclusion], model: nn.Module) -> None:
    """``ValueError`` for an entry that means no parameter of the model."""
    for entry in exclude:
        if not any(_covers(entry, model, name) for name, _ in _parameters(model)):
            label = entry if isinstance(entry, str) else entry.__name__
            example = next((name for name, _ in _parameters(model)), "nothing")
            raise ValueError(
                f"exclude: {label!r} fits nothing in the model; parameters are called like {example!r}"
            )


def is_excluded(exclude: Iterable[Exclusion], model: nn.Module, names: Iterable[str]) -> bool:
    """Whether a parameter, known by any of ``names``, is not to be pruned."""
    return any(_covers(entry, model, name) for entry in exclude for name in names)


def excluded_parameters(exclude: Iterable[Exclusion], model: nn.Module, graph: ChannelGraph) -> list[str]:
    """Return the excluded ones of the weights and tables of a graph, such as embeddings."""
    names: dict[str, tuple[str, ...]] = dict.fromkeys(tables(graph), ())
    names |= {name: kernels.aliases for name, kernels in graph.kernels.items()}
    return [name for name, others in names.items() if is_excluded(exclude, model, (name, *others))]


def tables(graph: ChannelGraph) -> list[str]:
    """Return the parameters that are read as they are, in the order of the graph."""
    return list(dict.fromkeys(u.name for op in graph.ops if isinstance(op, ir.Source) for u in op.params))


def _covers(entry: Exclusion, model: nn.Module, name: str) -> bool:
    """Whether an entry of ``exclude`` means this parameter, or a module around it."""
    path, above = "", []
    for atom in name.split(".")[:-1]:
        path = f"{path}.{atom}" if path else atom
        above.append(path)
    if isinstance(entry, str):
        return any(fnmatchcase(part, entry) for part in (name, *above))
    return any(isinstance(model.get_submodule(part), entry) for part in ("", *above))


def exclusions(exclude: Exclusion | Iterable[Exclusion]) -> tuple[Exclusion, ...]:
    single = isinstance(exclude, (str, type))
    if not single and not isinstance(exclude, Iterable):
        raise TypeError(f"exclude={exclude!r}: expected module names, patterns or module types")
    entries = (exclude,) if single else tuple(exclude)  # type: ignore[arg-type]
    for entry in entries:
        if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise TypeError(f"exclude: {entry!r}: expected a module's name, a pattern or a module type")
    return cast(tuple[Exclusion, ...], entries)


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: expected an integer")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: expected 0 <= seed < 2**63")


def resolve_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device={device!r}: not to be had here ({str(error).splitlines()[0]})") from error
    if found.type == "meta":
        raise ValueError("device='meta': nothing can be computed there; expected one such as 'cpu' or 'cuda'")
    return found


def _plan_ahead(budget: Allocation, sparsity: float, model: nn.Module) -> None:
    """Raises for a budget that no set of layers of this model could meet; the exact plan needs the graph."""
    if any(is_lazy(parameter) for parameter in model.parameters()):
        return  # capture says what to do about those
    plan(budget, sparsity, {n: tuple(p.shape) for n, p in _parameters(model) if p.dim() > 1 and p.numel()})
