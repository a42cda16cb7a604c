"""Go on with a smaller network: a masked model that trains comes in, its compact form, masked, goes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from torch.optim import Optimizer

from fxprune.capture import capture_own
from fxprune.rewrite import bare, put_masks, read
from fxprune.rewrite.compact import compact
from fxprune.rewrite.compact.kept import Kept, Slices
from fxprune.rewrite.compact.optimizer import move_optimizer
from fxprune.rewrite.compact.recipe import Recipe
from fxprune.rewrite.files.network import follow_recipes
from fxprune.rewrite.masking.computed import settled
from fxprune.sharded_types import is_dtensor
from fxprune.training.contract import TrainingMethod


def check_shrinks(
    method: TrainingMethod, returns: str, model: nn.Module, optimizers: Iterable[object] = ()
) -> None:
    """Raise ``ValueError`` for a model that cannot get smaller while ``method`` goes on.

    Of ``optimizers``, which are to follow it, each must be one of the model's own parameters.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizers: got a {kind}, expected those of the training: compact(optimizer)")
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizers: a {type(optimizer).__name__} has parameters that are not pruner.model's; make"
                " it of pruner.model.parameters()"
            )
    if method.regrows:
        raise ValueError(
            f"method {method.name!r}: its weights come back; compact when it is done, with"
            " fxprune.compact(pruner.model)"
        )
    if returns == "inplace":
        raise ValueError("returns='inplace': compact() makes another network; expected 'graph' or 'module'")
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise ValueError("model: it is split over processes; compact it before fully_shard")


def compacted(model: nn.Module, example_inputs: Any) -> tuple[fx.GraphModule, Slices]:
    """Compact a masked model, and mask what is left of it.

    Returns the network, and by parameter that got smaller what is left of it.
    """
    masks = read(model)
    small = compact(model, example_inputs, progress=False)
    kept: Slices = small.meta["fxprune"]["compaction"].kept
    values = dict(small.named_parameters())
    if masks and masks.keys().isdisjoint(values):
        raise ValueError(
            "model: its own forward has no graph; its parts have other names in the smaller network; go on"
            " with small = fxprune.compact(pruner.model), and a Pruner of that"
        )
    left = {}
    for name, mask in masks.items():
        if name in values:
            mask = kept[name].take(mask) if name in kept else mask
            left[name] = mask | (values[name] != 0)  # a masked bias may have taken a constant in
    put_masks(small, left)
    return small, kept


def followed(model: nn.Module, example_inputs: Any, recipes: Iterable[Mapping[str, Any]]) -> fx.GraphModule:
    """Cut a dense or masked model as a run before did; tensors have no values, modes stay.

    Raises ``ValueError`` where a recipe is of another network.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    original = settled(bare(model))
    given = original if isinstance(original, fx.GraphModule) else capture_own(original, example_inputs)
    small = follow_recipes(given, [Recipe(**recipe) for recipe in recipes], original)
    for name, module in small.named_modules():
        module.training = modes.get(name, modes[""])  # a cut network evaluates
    return small


def move(
    things: Iterable[Any],
    before: nn.Module,
    after: nn.Module,
    kept: Mapping[str, Kept] | None = None,
) -> None:
    """Make the optimizers among ``things`` those of ``after``, in place; their state goes along."""
    for thing in things:
        if isinstance(thing, Optimizer):
            move_optimizer(thing, before, after, kept or {})
