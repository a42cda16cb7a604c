"""Build a model of transformers in the shapes of its compact network, under a configuration that says so.

The model, its pruned form and the compact network come in; a model of the same class goes out, with the
compact network's weights. No class is known by name: fields of the configuration are tried out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.rewrite.masking.copying import duplicate

__all__ = ["resized"]

Shapes = dict[str, tuple[int, ...]]
Field = tuple[str, ...]
"""The path of a field through nested configurations."""

TRIED = 256
"""Configurations that are tried at most."""


def resized(model: Any, pruned: nn.Module, small: fx.GraphModule, inputs: Mapping[str, Tensor]) -> Any:
    """Build the class of ``model`` with the weights of a compact network.

    Args:
        model: of transformers, as it was read.
        pruned: the same, masked.
        small: the compact form of ``pruned``.
        inputs: by name, on which outputs are compared.

    Raises ``ValueError``, with the reason, where no configuration has these shapes, or where the class
    computes something else in them.
    """
    own, wanted = _shapes_of(model), _shapes_of(small)
    _check_names(model, own, wanted)
    _check_layers(own, wanted)
    with torch.random.fork_rng(devices=[]):  # a class draws weights when it is built
        return _found(model, pruned, small, inputs, own, wanted)


def _found(
    model: Any,
    pruned: nn.Module,
    small: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    own: Shapes,
    wanted: Shapes,
) -> Any:
    # Half precision rounds by more than a wrong configuration changes: outputs are compared in float32.
    wide = torch.promote_types(model.dtype, torch.float32)
    expected = _logits(_widened(pruned, model, wide), inputs)
    search, found = _Search(model, own, wanted), False
    for facts in search.configurations():
        found = True
        for scale in (False, True):
            new = _built(model, facts, small.state_dict(), own if scale else None, wide)
            if new is not None and _computes(new, inputs, expected):
                return new.to(model.dtype)
    name = next(name for name in wanted if wanted[name] != own[name])
    if found:
        raise ValueError(f"{type(model).__name__} computes other outputs where {name!r} is {wanted[name]}")
    why = f"; {search.refused[0]}" if search.refused else ""
    raise ValueError(
        f"no sizes in {type(model.config).__name__} make {name!r} {wanted[name]} and the others fit{why}; "
        f'keep its size with --exclude "{_siblings(name)}"'
    )


def _siblings(name: str) -> str:
    """Give a pattern of the layers beside the one of a parameter, in all blocks.

    >>> _siblings("h.0.attn.query.weight"), _siblings("head.weight")
    ('h.*.attn.*', 'head')
    """
    *above, layer, _ = name.split(".")
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", ".".join([*above, "*"]))
    return pattern if above else layer


def _shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _check_names(model: Any, own: Shapes, wanted: Shapes) -> None:
    kind, less = type(model).__name__, [name for name in own if name not in wanted]
    if any(name not in own for name in wanted):  # of a norm, how many channels there were
        table = model.get_input_embeddings()
        name = next((name for name, module in model.named_modules() if module is table), "*embed*")
        raise ValueError(
            f"the network became narrower between its layers, and the norms of {kind} cannot be told how wide"
            f' it was; keep that width with --exclude "{name}"'
        )
    if less:
        raise ValueError(f"{less[0]!r} is gone as a whole, and {kind} needs it; ask for less --sparsity")


def _check_layers(own: Shapes, wanted: Shapes) -> None:
    """Layers that had the same shape have to have it still."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, shape in own.items():
        other = first.setdefault((re.sub(r"\.\d+\.", ".*.", name), shape), name)
        if wanted[name] != wanted[other]:
            raise ValueError(
                f"layers end with different sizes: {other!r} is {wanted[other]}, {name!r} {wanted[name]}; "
                "take --scope uniform"
            )


class _Search:
    """Looks for values of fields under which a class has the wanted shapes; ``refused``: what it said."""

    def __init__(self, model: Any, own: Shapes, wanted: Shapes) -> None:
        self.model, self.own, self.wanted = model, own, wanted
        self.refused: list[str] = []

    def configurations(self) -> Iterator[dict[Field, int]]:
        """Yield values of fields under which the shapes are those, few fields first."""
        own, wanted = self.own, self.wanted
        sizes = {
            (before, after)
            for name in own
            for before, after in zip(own[name], wanted[name], strict=True)
            if before != after
        }
        choices: dict[Field, list[int]] = {}
        for field, value in _fields(self.model.config.to_dict()):
            new = {after if value is None else value * after // before for before, after in sizes}
            for option in sorted(new - {value, 0}):
                shapes = self._shapes_under({field: option})
                # One that is refused may do beside another.
                may_do = value is not None if shapes is None else _helps(shapes, own, wanted)
                if may_do:
                    choices.setdefault(field, []).append(option)
        combined = (
            dict(zip(fields, values, strict=True))
            for count in range(len(choices) + 1)
            for fields in combinations(choices, count)
            for values in product(*(choices[field] for field in fields))
        )
        for facts in islice(combined, TRIED):
            if self._shapes_under(facts) == wanted:
                yield facts

    def _shapes_under(self, facts: Mapping[Field, int]) -> Shapes | None:
        """The shapes of the class under other values; ``None`` where it refuses them."""
        from huggingface_hub import errors

        invalid = getattr(errors, "StrictDataclassError", ValueError)  # of newer versions
        try:
            with torch.device("meta"):
                return _shapes_of(type(self.model)(_config(self.model, facts)))
        except (invalid, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            asked = ", ".join(f"{'.'.join(field)}={value}" for field, value in facts.items())
            self.refused.append(f"{asked} is refused ({str(error).splitlines()[-1].strip()})")
            return None


def _fields(config: Mapping[str, Any], path: Field = ()) -> Iterator[tuple[Field, int | None]]:
    """Yield the fields that may be sizes: whole numbers, and those that are left to a rule."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, (*path, str(name)))
        elif value is None or (type(value) is int and value > 0):
            yield (*path, str(name)), value


def _helps(shapes: Shapes | None, own: Shapes, wanted: Shapes) -> bool:
    """Whether a change of a field brings some size to what is wanted, and changes none that stays."""
    if shapes is None or shapes.keys() != own.keys():
        return False
    changed = [name for name in own if shapes[name] != own[name]]
    return all(wanted[name] != own[name] for name in changed) and any(
        new == goal != old
        for name in changed
        for new, goal, old in zip(shapes[name], wanted[name], own[name], strict=True)
    )


def _config(model: Any, facts: Mapping[Field, Any]) -> Any:
    values = model.config.to_dict()
    for field, value in facts.items():
        place = values
        for name in field[:-1]:
            place = place[name]
        place[field[-1]] = value
    return type(model.config).from_dict(values)


def _widened(pruned: nn.Module, model: Any, dtype: torch.dtype) -> nn.Module:
    """A copy in ``dtype``; tables that are not saved are as its class makes them when a file is read."""
    copy = duplicate(pruned).to(dtype).eval()
    fresh, saved = dict(type(model)(_config(model, {})).to(dtype).named_buffers()), copy.state_dict()
    with torch.no_grad():
        for name, buffer in copy.named_buffers():
            if name in fresh and name not in saved and fresh[name].shape == buffer.shape:
                buffer.copy_(fresh[name])
    return copy


def _built(
    model: Any,
    facts: Mapping[Field, int],
    state: Mapping[str, Tensor],
    scaled: Shapes | None,
    dtype: torch.dtype,
) -> Any | None:
    """The class under other values, with weights; ``scaled``: the shapes before, to make up in norms.

    A norm by the root of the mean square has another mean over fewer channels: ``n / m`` times as large,
    if m of n are left and the others were zero. The eps is scaled by ``n / m``, the weight by its square
    root.
    """
    facts, state = dict(facts), dict(state)
    if scaled is not None:
        norms = [name for name, tensor in state.items() if tensor.dim() == 1 and name.endswith("norm.weight")]
        norms = [name for name in norms if scaled[name] != tuple(state[name].shape)]
        ratios = {scaled[name][0] / len(state[name]) for name in norms}
        if len(ratios) != 1:
            return None
        ratio = ratios.pop()
        state |= {name: state[name].to(dtype) * ratio**0.5 for name in norms}
        values = model.config.to_dict()
        facts |= {(name,): value * ratio for name, value in values.items() if name.endswith("rms_norm_eps")}
    new = type(model)(_config(model, facts)).to(dtype).eval()
    new.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = model.generation_config
    return new


def _logits(network: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(**inputs)[0]
    return found


def _computes(new: Any, inputs: Mapping[str, Tensor], expected: Tensor) -> bool:
    """Whether outputs are those that are expected, up to rounding in their dtype."""
    try:
        found = _logits(new, inputs)
    except (ValueError, RuntimeError, LookupError):  # such as an odd number of rotated channels
        return False
    if found.shape != expected.shape:
        return False
    tolerance: float = torch.finfo(expected.dtype).eps ** 0.5
    return float((found - expected).norm()) <= tolerance * float(expected.norm())
