"""LogSynFlow: SynFlow with the logarithm of the gradient, so that a few large ones do not dominate."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fxprune.scoring.contract import Method
from fxprune.scoring.synaptic import Synapse, in_rounds

NEGLIGIBLE = 1e-7
"""ln(1 + x) and x are the same number in float32 for x below this."""
SATURATED = 17.0
"""ln(1 + e^x) and x are the same number in float32 for x above this."""


def logsynflow(*, rounds: int = 100, resolution: Literal["spatial", "channel"] = "spatial") -> Method:
    """Logarithmic synaptic flow (Cavagnero, Robbiano, Caputo, Averta 2022, FreeREA, arXiv 2207.05135).

    Score: ``|w| * ln(1 + dR/d|w|)``, with R as in SynFlow: the sum of the outputs that the network gives for
    an all-ones input with weights |w| * m, without biases, norms and activations; average pooling averages.
    Needs nothing but shapes.

    Options:
        rounds: number of rounds, under an exponential schedule unless ``schedule`` says otherwise
        resolution: "spatial" is the paper's (positions count); "channel" collapses them and is faster

    Its authors score whole architectures with it, in one pass; here it is the criterion of SynFlow's loop.
    Scores of a layer do not add up to R, so that nothing keeps layers from collapsing. Computed from ln R and
    its derivatives, so that it is finite where R is beyond every float.

    Cost: as `synflow`.
    When: as `synflow`, where that gives too much to few layers; nothing keeps layers from collapsing.
    """
    return Method(
        name="logsynflow",
        find=in_rounds(Synapse(gain=_log_gain), rounds=rounds, resolution=resolution, name="logsynflow"),
        needs=frozenset({"graph"}),
        summary="SynFlow with the logarithm of the gradient; no data",
        paper="Cavagnero et al. 2022, FreeREA, arXiv 2207.05135",
    )


def _log_gain(gradient: Tensor, log_total: float) -> Tensor:
    """Return ln(1 + dR/d|w|) from d ln R / d|w| and ln R; divided by R where R is below one.

    It is zero where the gradient is. The division keeps the order; without it, scores of deep and sparse
    networks would be subnormal numbers.
    """
    if log_total < 0:
        total = math.exp(log_total)
        slope = gradient * total
        if not bool((slope > NEGLIGIBLE).any()):
            return gradient
        return torch.where(slope > NEGLIGIBLE, slope.log1p() / total, gradient)
    least = torch.finfo(gradient.dtype).tiny
    # ln dR/d|w|. Logarithms of zeros and of subnormal numbers would take ten times as long.
    logarithm = gradient.clamp(min=least).log_().add_(log_total)
    if bool(logarithm.amin() < SATURATED):
        logarithm = softplus(logarithm)
    return logarithm if bool(gradient.amin() > 0) else logarithm.mul_(gradient > 0)
