"""Write a whole network to a file, masked, compact or dense, and build it again from a fresh original."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fxprune.capture import capture
from fxprune.capture.errors import CaptureError, check_module
from fxprune.capture.shell import in_shell, renamed
from fxprune.keywords import refuse_unknown
from fxprune.rewrite.compact.plain_values import Unwritable, decode_tree, encode_tree
from fxprune.rewrite.compact.recipe import Recipe
from fxprune.rewrite.compact.replay import first_difference, replay
from fxprune.rewrite.compact.trial import NodeFailure
from fxprune.rewrite.files.container import CHECKSUM, FORMAT, read_container
from fxprune.rewrite.files.state import assign, cast, check_fit, held, tied_names, transient_types
from fxprune.rewrite.files.tensors import decode_tensors, encode_tensors
from fxprune.rewrite.masking.computed import (
    computed_weights,
    masks_of_computed,
    put_computed,
    value_of,
)
from fxprune.rewrite.masking.copying import duplicate
from fxprune.rewrite.masking.finalize import BAKED, finalize, plain
from fxprune.rewrite.masking.install import install, put_masks
from fxprune.rewrite.masking.masked_module import form_of, original_class
from fxprune.rewrite.masking.parameters import join, read, unwrap
from fxprune.sharded_types import is_dtensor
from fxprune.torch_private import pytree

__all__ = ["NETWORK_VERSION", "follow_recipes", "is_network", "load", "network_file"]

NETWORK_VERSION = "2"
DAMAGE = (KeyError, TypeError, AttributeError, ValueError, RuntimeError, IndexError, NodeFailure)


@dataclass(frozen=True)
class _Manifest:
    """Say how the tensors of a file become a network; see :func:`network_file` for the fields."""

    kind: str
    inputs: dict[str, Any] | None
    parameters: dict[str, list[int]]
    classes: dict[str, str]
    layout: dict[str, Any]
    tied: dict[str, str]
    transient: dict[str, str]
    direct: list[str]
    recipes: list[Recipe]
    computed: list[str] = field(default_factory=list)


def network_file(network: nn.Module, *, sparse: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and header entries for the file of a network.

    The header's ``manifest`` is JSON: ``kind`` ("graph", "module"), ``inputs`` of the capture, ``parameters``
    of the original (name -> shape), ``classes`` of the modules with parameters, ``layout`` of the tensors,
    ``tied`` names, ``transient`` buffers' types, names that are read ``direct``, the ``recipes`` of
    compactions, with the indices that were kept of every parameter, and the ``computed`` weights that have a
    mask, which is one of the tensors.

    Raises:
        ValueError: the network cannot be built again from its original; the message says why.
    """
    inside = unwrap(network)
    recipes: list[Recipe] = getattr(inside, "meta", {}).get("fxprune", {}).get("recipes", [])
    _demand_writable(inside, recipes)
    masks, tied = read(inside), tied_names(inside)
    values = {
        one.name: one.tensor.detach().masked_fill(~masks[one.name], 0.0) if one.name in masks else one.tensor
        for one in held(inside)
        if one.name not in tied
    }
    tensors, layout = encode_tensors(values, masks, sparse=sparse)
    own = {name: list(parameter.shape) for name, parameter in inside.named_parameters()}
    manifest = {
        "kind": "graph" if isinstance(inside, fx.GraphModule) else "module",
        "inputs": _inputs(inside),
        "parameters": recipes[0].parameters if recipes else own,
        "classes": _classes(inside),
        "layout": layout,
        "tied": tied,
        "transient": transient_types(inside),
        "direct": _direct(inside),
        "recipes": [recipe.to_json() for recipe in recipes],
        "computed": list(masks_of_computed(inside)),
    }
    return tensors, {"manifest": json.dumps(manifest)}


def load(
    path: str | os.PathLike[str], model: nn.Module, *, example_inputs: Any = None, **others: NoReturn
) -> nn.Module:
    """Build the network that :func:`fxprune.save` wrote, from a fresh copy of its original.

    Args:
        path: the file, of a masked, compact or plain network.
        model: the original architecture, freshly built (``timm.create_model(...)``); its weights do not
            matter, and it is not changed. Its device and its modes are those of the result.
        example_inputs: as in :func:`fxprune.apply`; by default those of the capture that was saved.

    Returns:
        The network with its weights and masks, computing what the saved one did: a ``GraphModule``, or a
        module of the model's own class if one was saved.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not one of ours, or holds masks or a ticket only; or ``model`` is not
            its original: the message names the first parameter or node that does not fit; or the capture
            needs the numbers of its inputs, and ``example_inputs`` is not given.

    >>> import tempfile
    >>> from fxprune.rewrite import install, save
    >>> layer = nn.Linear(2, 1)
    >>> install(layer, {"weight": torch.tensor([[True, False]])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(layer, f"{folder}/layer.safetensors")
    ...     again = load(f"{folder}/layer.safetensors", nn.Linear(2, 1))
    >>> torch.equal(again.weight, layer.weight), again.weight_mask
    (True, tensor([[ True, False]]))
    """
    refuse_unknown(load, others)
    check_module(model)
    header, tensors = read_container(path, "network")
    _demand_network(path, header)
    try:
        manifest = _read_manifest(header["manifest"])
        values, masks = decode_tensors(tensors, manifest.layout)
    except DAMAGE as error:
        raise ValueError(f"{os.fspath(path)}: damaged network file ({error})") from error
    original = plain(unwrap(model))
    modes = {name: module.training for name, module in unwrap(model).named_modules()}
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        network = _rebuilt(manifest, original, example_inputs, values)
        _mask_computed(network, manifest.computed)
        check_fit(network, values, manifest.tied)
        _check_classes(network, manifest.classes)
        assign(network, values, manifest.tied)
        cast(network, values, manifest.tied, manifest.transient)
        if manifest.kind == "module":
            put_masks(network, masks, direct=manifest.direct)
        else:
            install(network, masks)
    for name, module in network.named_modules():
        module.train(modes.get(name, modes[""]))
    return network


def _mask_computed(network: nn.Module, names: list[str]) -> None:
    """Give computed weights a mask, which keeps all until its values are read from the file."""
    places = computed_weights(network)
    for name in names:
        if name not in places:
            raise ValueError(
                f"model: its {name!r} is not computed from other parameters, as it was when saved"
            )
        module, leaf = places[name]
        put_computed(module, leaf, torch.ones_like(value_of(module, leaf), dtype=torch.bool))


def is_network(header: dict[str, str]) -> bool:
    """Whether a header is that of a whole network."""
    return header.get("format") == FORMAT and header.get("format_version") == NETWORK_VERSION


def _demand_writable(network: nn.Module, recipes: list[Recipe]) -> None:
    for recipe in recipes:
        if recipe.unwritable:
            raise ValueError(f"network: its compaction cannot be written to a file ({recipe.unwritable})")
    for path, module in network.named_modules():
        frozen = form_of(module)
        if (BAKED in vars(module) and not recipes) or (frozen is not None and frozen.kind == "frozen"):
            raise ValueError(
                f"network: finalize has made another layer of {path or 'it'!r}, whose kernel is computed from"
                " its weight; save the masked network instead"
            )
    for name, parameter in network.named_parameters():
        if is_dtensor(parameter) or parameter.is_meta:
            raise ValueError(
                f"network: {name!r} is split over processes or has no values; load its full state dict"
                " (torch.distributed.checkpoint.state_dict) into a masked model, and save that"
            )


def _demand_network(path: str | os.PathLike[str], header: dict[str, str]) -> None:
    name = os.fspath(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{name}: not an fxprune network file, expected one that fxprune.save wrote")
    if header.get("form") == "ticket":
        raise ValueError(f"{name}: a ticket, without weights; use fxprune.load_ticket")
    if header.get("form") == "masks":
        raise ValueError(
            f"{name}: masks without weights; use fxprune.set_masks(model, fxprune.load_masks(path))"
        )
    if not is_network(header):
        raise ValueError(
            f"{name}: network format {header.get('format_version')!r}, this fxprune reads {NETWORK_VERSION};"
            f" use the fxprune that wrote it ({header.get('fxprune')})"
        )
    if CHECKSUM not in header:
        raise ValueError(f"{name}: damaged network file (it has no checksum)")


def _read_manifest(text: str) -> _Manifest:
    fields = json.loads(text)
    recipes = [Recipe(**recipe) for recipe in fields.pop("recipes")]
    return _Manifest(**fields, recipes=recipes)


def _inputs(network: nn.Module) -> dict[str, Any] | None:
    """The inputs of the capture, by name; None where they are not known."""
    if not isinstance(network, fx.GraphModule):
        return None
    places = [node for node in network.graph.nodes if node.op == "placeholder"]
    try:
        return {str(node.target).lstrip("*"): encode_tree(node.meta["val"]) for node in places}
    except (KeyError, Unwritable):
        return None


def _classes(network: nn.Module) -> dict[str, str]:
    """The names of the classes that modules with parameters had before they were masked."""
    return {
        path: original_class(module).__name__
        for path, module in network.named_modules()
        if path and any(parameter is not None for parameter in module._parameters.values())
    }


def _check_classes(network: nn.Module, classes: dict[str, str]) -> None:
    found = _classes(network)
    for path, name in classes.items():
        if found.get(path) != name:
            raise ValueError(
                f"model: {path!r} is a {found.get(path)}, in the saved network a {name}; build it as it was"
            )


def _direct(network: nn.Module) -> list[str]:
    """The masked parameters that a module reads without calling their owner."""
    found = []
    for path, module in network.named_modules():
        form = form_of(module)
        if form is not None and form.kind == "reads":
            found += [join(path, target) for target in form.targets if "." in target]
    return found


def _rebuilt(
    manifest: _Manifest, original: nn.Module, example_inputs: Any, values: dict[str, Tensor]
) -> nn.Module:
    """A network of the shapes in the file; the values of its tensors mean nothing."""
    own, wanted = dict(original.named_parameters(remove_duplicate=False)), manifest.parameters.keys()
    if not wanted <= own.keys() and wanted <= renamed(own).keys():  # its graph called it as a whole
        original = in_shell(original)
    _check_parameters(original, manifest.parameters, manifest.tied)
    original = duplicate(original)
    inputs = example_inputs
    if inputs is None and manifest.inputs is not None:
        inputs = decode_tree({"dict": [[name, value] for name, value in manifest.inputs.items()]})
    if _is_of_file_type(inputs, values):
        cast(original, values, manifest.tied, manifest.transient)
    if manifest.kind == "module":
        return original
    try:
        captured = capture(original, inputs)
    except CaptureError as error:
        if example_inputs is not None:
            raise
        raise ValueError(
            f"example_inputs=None: the shapes in the file are not enough to capture the model ({error}); "
            "pass inputs that it takes"
        ) from error
    return follow_recipes(captured, manifest.recipes, original, example_inputs)


def follow_recipes(
    network: fx.GraphModule, recipes: Iterable[Recipe], original: nn.Module, example_inputs: Any = None
) -> fx.GraphModule:
    """Cut a captured network as compactions did, one after the other; the values of tensors mean nothing.

    ``original``: the model that was captured. Raises ``ValueError`` where a recipe is of another network.
    """
    for recipe in recipes:
        network = _followed(network, recipe, original, example_inputs)
    return network


def _is_of_file_type(inputs: Any, values: dict[str, Tensor]) -> bool:
    """Whether the inputs of the capture are of a type that the weights have; these may have changed since."""
    given = {x.dtype for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()}
    return not given or bool(given & {value.dtype for value in values.values()})


def _check_parameters(model: nn.Module, wanted: dict[str, list[int]], tied: dict[str, str]) -> None:
    """``ValueError``, with the name of the first parameter that differs, unless all are there."""
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in wanted.items():
        if name not in found:
            raise ValueError(f"model: it has no parameter {name!r}, which the saved network's original had")
        if list(found[name].shape) != shape:
            raise ValueError(
                f"model: the parameter {name!r} has shape {tuple(found[name].shape)}, in the saved network's"
                f" original {tuple(shape)}"
            )
    for name, _ in model.named_parameters():
        if name not in wanted and name not in tied:
            raise ValueError(
                f"model: it has a parameter {name!r}, which the saved network's original had not"
            )


def _followed(network: nn.Module, recipe: Recipe, original: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Cut a network as the recipe says, in the first form of it that has the recipe's graph."""
    difference: str | None = None
    for gm in _forms(network, recipe, original):
        found = first_difference(gm, recipe)
        if found is None:
            try:
                return replay(gm, recipe, example_inputs)
            except DAMAGE as error:
                raise ValueError(f"model: the saved network cannot be cut from it ({error})") from error
        difference = difference or found
    raise ValueError(
        f"model: its graph is not that of the saved network's original, first at node {difference}; it has"
        " other code or other settings, or was captured by another version of PyTorch"
    )


def _forms(network: nn.Module, recipe: Recipe, original: nn.Module) -> Iterator[fx.GraphModule]:
    """A captured network as it is, captured anew, and as finalize leaves it when masks were there."""
    assert isinstance(network, fx.GraphModule)
    yield network
    again = capture(network)
    yield again
    names = dict(network.named_parameters(remove_duplicate=False))
    ones = {name: torch.ones(names[name].shape, dtype=torch.bool) for name in recipe.masked if name in names}
    computed = [name for name in recipe.masked if name in computed_weights(again)]
    if ones or computed:
        masked = duplicate(again)
        install(masked, ones)
        _mask_computed(masked, computed)
        yield finalize(masked)
        inside = duplicate(original)
        put_masks(inside, ones)
        _mask_computed(inside, [name for name in computed if name in computed_weights(inside)])
        inputs = {str(n.target): n.meta["val"] for n in network.graph.nodes if n.op == "placeholder"}
        yield capture(finalize(inside), inputs)
