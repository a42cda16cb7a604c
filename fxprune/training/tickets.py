"""A ticket comes back: a file that ``save(..., form="ticket")`` wrote and a model of any weights come in."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from torch import fx, nn

from fxprune.capture import calls_whole, capture, renamed
from fxprune.capture.errors import check_module
from fxprune.keywords import refuse_unknown
from fxprune.rewrite import bare, install, read, read_ticket
from fxprune.rewrite.files.tickets import neutralise, set_centroids
from fxprune.rewrite.masking.copying import duplicate


def load_ticket(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Any = None,
    **others: NoReturn,
) -> fx.GraphModule:
    """The network of a ticket: masked, every kept weight at its layer's centroid, biases 0 and norms 1.

    Args:
        path: the file.
        model: any copy of the architecture; its weights do not matter, save for those that a ticket has
            nothing about: embeddings, tokens, and layers that were not pruned keep the values they have here.
            It is not changed.
        example_inputs: as for :func:`fxprune.apply`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ticket, damaged, or of another architecture.

    >>> import tempfile, torch, fxprune
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> x = torch.ones(1, 4)
    >>> pruned = fxprune.apply(net, "magnitude", 0.5, example_inputs=x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fxprune.save(pruned, f"{folder}/t.safetensors", form="ticket")
    ...     again = load_ticket(f"{folder}/t.safetensors", net, example_inputs=x)
    >>> sum(int(p.count_nonzero()) for p in again.parameters())
    6
    """
    refuse_unknown(load_ticket, others)
    check_module(model)
    masks, values, signs = read_ticket(path)
    source = bare(model) if read(model) else model
    gm = capture(source, example_inputs)
    if calls_whole(gm, source) and masks.keys() <= dict(source.named_parameters()).keys():
        masks, values, signs = renamed(masks), renamed(values), renamed(signs)
    network = duplicate(gm)
    install(network, masks)
    set_centroids(network, values, signs)
    neutralise(network)
    return network
