"""SynFlow: keeps the weights that carry the most synaptic flow, in many small rounds, without data."""

from __future__ import annotations

from typing import Literal

from fxprune.scoring.contract import Method
from fxprune.scoring.synaptic import Synapse, in_rounds


def synflow(*, rounds: int = 100, resolution: Literal["spatial", "channel"] = "spatial") -> Method:
    """Synaptic flow (Tanaka, Kunin, Yamins, Ganguli 2020, arXiv 2006.05467).

    Score: ``|w| * d ln R / d|w|``, with R the sum of the outputs that the network gives for an all-ones input
    with weights |w| * m, without biases, norms and activations; average pooling averages, as in the original.
    ln R instead of R leaves the order as it is and cannot overflow. Needs nothing but shapes.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster

    Deviations from the authors' code, which runs the network itself: BatchNorm is left out even where it is
    not the identity, so that trained statistics cannot make the flow negative; the count is exact. Where two
    values multiply (attention, gates), R takes the geometric mean of what each carries, so that neither
    starves: the sum of both would let queries and keys, which meet in every channel, displace the values.

    Cost: one count of paths with its derivative per round, which is a pass over the graph, whatever the
        batch.
    When: at initialization, without data, at high sparsities: layers do not collapse.
    """
    return Method(
        name="synflow",
        find=in_rounds(Synapse(), rounds=rounds, resolution=resolution, name="synflow"),
        needs=frozenset({"graph"}),
        summary="keeps the weights that carry the most synaptic flow; no data",
        paper="Tanaka et al. 2020, arXiv 2006.05467",
    )
