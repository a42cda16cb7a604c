"""Put masks into a model, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import GraphModule

from fxprune.capture.errors import check_module
from fxprune.keywords import refuse_unknown
from fxprune.rewrite.masking.averages import identify, mask_averages, note
from fxprune.rewrite.masking.computed import (
    check_computed,
    computed_weights,
    masks_of_computed,
    put_computed,
    settled,
)
from fxprune.rewrite.masking.graph_reads import check_reads, mask_reads
from fxprune.rewrite.masking.masked_module import (
    Form,
    form_of,
    is_stock,
    masked_class,
    original_class,
)
from fxprune.rewrite.masking.operand_probe import needs_operand_mask
from fxprune.rewrite.masking.optimizer_hook import enrol
from fxprune.rewrite.masking.parameters import (
    CONTAINERS,
    Place,
    check,
    join,
    parameter_at,
    places,
    tied,
    unwrap,
)
from fxprune.rewrite.masking.sharded import home, reshard, sharded_class
from fxprune.rewrite.masking.state_dict import adapt
from fxprune.rewrite.masking.storage import SUFFIX, clean, zero
from fxprune.sharded_types import is_fsdp_module

GAP = 0.1
"""The share of a model's matrix weights that may be without a mask before ``set_masks`` says so."""


def install(module: nn.Module, masks: Mapping[str, torch.Tensor], direct: Iterable[str] = ()) -> None:
    """Make ``module`` compute with masked weights, in place.

    The modules that own the named parameters keep their identity and their parameters, and change class;
    reads of parameters in a graph get a multiplication. Pruned weights become 0.0 in storage.
    Names that ``masks`` lacks keep what they have; masks that exist already change in place, so that
    compiled code stays valid.

    Args:
        module: a graph module or a plain module.
        masks: parameter name -> bool tensor of its shape, ``True`` = kept. Tied parameters share one mask:
            naming one of the names is enough.
        direct: names of parameters that a *plain* module reads without calling their owner, as in
            ``F.linear(x, self.qkv.weight)``. (``nn.MultiheadAttention`` and graphs need no telling.)

    Raises:
        TypeError, ValueError: a mask of wrong name, shape or dtype; tied masks that differ. Nothing is
            changed then.
        RuntimeError: the parameter is split over processes, and not by ``fully_shard``.

    A weight that is computed (``parametrize``, ``weight_norm``, ``spectral_norm``) takes its mask after it is
    computed, under its own name; the parameters it is computed from stay as they are.

    A model that ``fully_shard`` has split takes whole masks, the same in all processes, before or after it is
    split.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> bool(layer.weight[0, 1] == 0), isinstance(layer, nn.Linear)
    (True, True)
    """
    reshard(module)
    computed = computed_weights(module)
    later = {name: masks[name] for name in computed if isinstance(masks, Mapping) and name in masks}
    check_computed(later, computed)
    chosen = check(module, {name: masks[name] for name in masks if name not in later} if later else masks)
    direct = [name for name in direct if name not in computed]
    everywhere = tied(module)
    targets = [(place, chosen[key]) for key in chosen for place in everywhere[key]]
    names = {join(path, attribute) for (path, _, attribute), _ in targets}
    unknown = [name for name in direct if name not in names and name not in _all_names(everywhere)]
    if unknown:
        raise ValueError(f"direct: no parameter {unknown[0]!r} in the model")
    forms = _forms(module, [place for place, _ in targets], set(direct))
    graphs = [part for part in module.modules() if isinstance(part, GraphModule)] if chosen else []
    for graph in graphs:
        check_reads(graph, chosen)
    for (_, owner, attribute), mask in targets:
        _put(owner, attribute, mask)
    for owner, form in forms:
        _reclass(owner, form)
    for graph in graphs:
        mask_reads(graph)
    owners = list({id(owner): owner for (_, owner, _), _ in targets}.values())
    for owner in owners:
        note(owner)
    mask_averages(owners)
    for name, mask in later.items():
        put_computed(*computed[name], mask)


def set_masks(
    model: nn.Module, masks: Mapping[str, torch.Tensor], *, direct: Iterable[str] = (), **others: NoReturn
) -> None:
    """Set the masks of a model, in place; names that ``masks`` lacks keep the mask they have, or none.

    Warns (``UserWarning``), with what was set and what was not, where over a tenth of the weights of
    convolutions, linear layers and the like has no mask after it: masks may be those of another model.

    Args:
        model: a graph module or plain module, masked before or not, also inside ``torch.compile``, DDP or an
            averaged model.
        masks: parameter name in the original model -> bool tensor of its shape, ``True`` = kept. What
            becomes kept starts from 0.0, what becomes pruned is 0.0 from now on.
        direct: as for :func:`install`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`install`; nothing is applied in part.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> set_masks(layer, {"weight": torch.tensor([[True, False]])})
    >>> layer.weight_mask
    tensor([[ True, False]])
    """
    refuse_unknown(set_masks, others)
    check_module(model)
    put_masks(model, masks, direct=direct)
    _warn_of_gaps(unwrap(model), masks)


def put_masks(model: nn.Module, masks: Mapping[str, torch.Tensor], *, direct: Iterable[str] = ()) -> None:
    """Set masks as :func:`set_masks` does, without a word about parameters that have none."""
    inside = unwrap(model)
    classes = [type(module) for module in inside.modules()]
    install(inside, masks, direct)
    if inside is not model and classes != [type(module) for module in inside.modules()]:
        # Code compiled for the dense model may not be guarded by the class of torch's layers (torch 2.9).
        torch.compiler.reset()


def _warn_of_gaps(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Warn if much of the model has no mask; embeddings have none as a rule and do not count."""
    matrices: dict[int, tuple[str, nn.Parameter, bool]] = {}
    computed = masks_of_computed(model)
    for path, module, attribute in places(settled(model)):
        parameter = parameter_at((path, module, attribute))
        if parameter.dim() > 1 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            has_mask = attribute + SUFFIX in module._buffers or join(path, attribute) in computed
            matrices.setdefault(id(parameter), (join(path, attribute), parameter, has_mask))
    bare = {name: parameter.numel() for name, parameter, has_mask in matrices.values() if not has_mask}
    size = sum(parameter.numel() for _, parameter, _ in matrices.values())
    if masks and sum(bare.values()) > GAP * size:
        largest = sorted(bare, key=lambda name: -bare[name])[:4]
        warnings.warn(
            f"set_masks: {len(masks)} masks were set; {sum(bare.values()):,} of {size:,} weights, in"
            f" {len(bare)} of {len(matrices)} parameters, have none, the largest: {', '.join(largest)}",
            UserWarning,
            stacklevel=3,
        )


def _all_names(everywhere: dict[int, list[Place]]) -> set[str]:
    return {join(path, attribute) for group in everywhere.values() for path, _, attribute in group}


def _put(owner: nn.Module, attribute: str, mask: torch.Tensor) -> None:
    """The mask into its buffer, zeros into the storage."""
    parameter = owner._parameters[attribute]
    assert parameter is not None
    present = owner._buffers.get(attribute + SUFFIX)
    if present is None:
        owner.register_buffer(attribute + SUFFIX, mask.detach().to(home(parameter), copy=True))
    else:
        present.copy_(mask)
    zero(parameter, mask)


def _reclass(owner: nn.Module, form: Form | None) -> None:
    """Gives a module the class of its form and puts it under the optimisers' hook."""
    if form is None:
        # A graph module makes its own classes: its load hook does what the class does elsewhere.
        hooks: dict[int, Any] = owner._load_state_dict_pre_hooks
        if _adapt_hook not in [entry.hook for entry in hooks.values()]:
            owner.register_load_state_dict_pre_hook(_adapt_hook)  # type: ignore[no-untyped-call]
            owner.register_state_dict_post_hook(_clean_hook)  # type: ignore[no-untyped-call]
    elif form_of(owner) != form:
        cls = masked_class(original_class(owner), form)
        owner.__class__ = sharded_class(cls, owner) if is_fsdp_module(owner) else cls
    identify(owner)
    enrol(owner)


def _clean_hook(module: nn.Module, *rest: object) -> None:
    clean(module)


def _adapt_hook(module: nn.Module, state_dict: dict[str, object], prefix: str, *rest: object) -> None:
    adapt(module, state_dict, prefix, rest[-1])  # type: ignore[arg-type]


def _forms(module: nn.Module, targets: list[Place], direct: set[str]) -> list[tuple[nn.Module, Form | None]]:
    """The form of every module whose class has to change, found without changing anything."""
    reads: dict[str, set[str]] = {}
    owners: dict[str, tuple[nn.Module, set[str]]] = {}
    for path, owner, attribute in targets:
        owners.setdefault(path, (owner, set()))[1].add(attribute)
        told = join(path, attribute) in direct or isinstance(owner, (nn.ParameterList, nn.ParameterDict))
        reader = _reader(module, path) if told or _feeds_attention(module, path) else None
        if reader is not None:
            relative = join(path[len(reader) :].lstrip("."), attribute)
            reads.setdefault(reader, set()).add(relative)
    forms: list[tuple[nn.Module, Form | None]] = []
    for path in {**owners, **reads}:
        owner = module.get_submodule(path)
        attributes = owners[path][1] if path in owners else set()
        forms.append((owner, _form(path, owner, attributes, reads.get(path, set()))))
    return forms


def _feeds_attention(module: nn.Module, path: str) -> bool:
    """Whether this is the output projection of an attention, which reads its weight without calling it."""
    parent, _, name = path.rpartition(".")
    if name != "out_proj" or not isinstance(module.get_submodule(parent), nn.MultiheadAttention):
        return False
    # Compaction writes attention out in the graph, which then calls the projection itself.
    return not (isinstance(module, GraphModule) and any(node.target == path for node in module.graph.nodes))


def _reader(module: nn.Module, path: str) -> str | None:
    """The nearest module above ``path`` that has a forward of its own; None when a graph does the reading."""
    while path:
        path = path.rpartition(".")[0]
        above = module.get_submodule(path)
        if isinstance(above, GraphModule) or type(above) is nn.Module:
            return None
        if not isinstance(above, CONTAINERS):
            return path
    return None


def _form(path: str, owner: nn.Module, attributes: set[str], reads: set[str]) -> Form | None:
    """Choose how a module applies its masks: those it has, on its ``attributes``, and on ``reads``."""
    if isinstance(owner, GraphModule):
        return None
    base = original_class(owner)
    present = form_of(owner)
    if present is not None:
        reads = reads | {target for target in present.targets if "." in target}
        attributes = attributes | {
            name for name in owner._parameters if owner._buffers.get(name + SUFFIX) is not None
        }
    if base is nn.Module or issubclass(base, (nn.ParameterList, nn.ParameterDict)):
        return Form("keep")
    if not reads and attributes <= {"weight"} and is_stock(base):
        return Form("stock")
    operands = set(present.operands) if present is not None else set()
    if not isinstance(owner, nn.MultiheadAttention) and not is_stock(base):
        for name in attributes - set(present.targets if present is not None else ()):
            try:
                matrix = owner._parameters[name].dim() > 1  # type: ignore[union-attr]  # a bias is no kernel
                operands |= {name} if matrix and needs_operand_mask(owner, name) else set()
            except ValueError as error:
                raise ValueError(f"masks[{join(path, name)!r}]: {error}") from error
    return Form("reads", tuple(sorted(attributes | reads)), tuple(sorted(operands)))
