"""SynFlow-L2: synaptic flow of squared weights, the trace of the path kernel."""

from __future__ import annotations

from typing import Literal

import torch

from fxprune.scoring.contract import Method
from fxprune.scoring.synaptic import Synapse, in_rounds


def synflow_l2(
    *,
    rounds: int = 100,
    resolution: Literal["spatial", "channel"] = "spatial",
    form: Literal["squared", "linear"] = "squared",
) -> Method:
    """SynFlow on squared weights (Gebhart, Saxena, Schrater 2021, arXiv 2101.10552).

    Score: ``w^2 * d ln R / d(w^2)``, with R the sum of the outputs that the network gives for an all-ones
    input with weights w^2 * m, without biases, norms and activations; average pooling averages. Every layer
    that all paths cross carries the same sum of scores, so that none collapses. It is PX (arXiv 2406.01820)
    without data. Needs nothing but shapes.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster
        form: "squared" is the score above; "linear" is |w| * d ln R / d(w^2), which the code of PX and PHEW
            computes and which ranks differently

    Deviation from those codes: ln R instead of R leaves the order as it is and cannot overflow; norms are
    left out, where the code squares them.

    Cost: as `synflow`.
    When: as `synflow`; it leaves fewer channels in use, each with more weights.
    """
    synapse = Synapse(strength=torch.square) if form == "squared" else Synapse(edge=torch.square)
    return Method(
        name="synflow-l2",
        find=in_rounds(synapse, rounds=rounds, resolution=resolution, name="synflow-l2"),
        needs=frozenset({"graph"}),
        summary="keeps the weights that carry the most flow of squared weights; no data",
        paper="Gebhart et al. 2021, arXiv 2101.10552",
    )
