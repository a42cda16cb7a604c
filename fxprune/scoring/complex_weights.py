"""Score complex weights: each is one weight, whose mask multiplies both of its parts."""

from __future__ import annotations

import torch

from fxprune.scoring.contract import Problem

__all__ = ["refuse_complex", "removal", "squared"]


def removal(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The derivative of a loss by a factor on each weight, ``Re(conj(g) w)``; written into a real gradient.

    ``gradient`` is as PyTorch gives it: ``dL/dRe(w) + i dL/dIm(w)``.

    >>> removal(torch.tensor([1 + 2j]), torch.tensor([3 + 4j])), removal(torch.ones(1), torch.full((1,), 2.0))
    (tensor([11.]), tensor([2.]))
    """
    return (gradient.conj() * weight).real if gradient.is_complex() else gradient.mul_(weight)


def squared(tensor: torch.Tensor) -> torch.Tensor:
    """``|x|^2``, a real number for a complex one.

    >>> squared(torch.tensor([3 + 4j]))
    tensor([25.])
    """
    return tensor.abs().square() if tensor.is_complex() else tensor.square()


def refuse_complex(problem: Problem, method: str) -> None:
    """``ValueError`` for complex weights, where a method's equations are for real ones."""
    found = next((name for name, weight in problem.weights.items() if weight.is_complex()), None)
    if found is not None:
        raise ValueError(
            f"method {method!r} is for real weights, and {found!r} is complex; exclude it, or take "
            "'magnitude', 'snip' or 'synflow'"
        )
