"""The training methods by name: a name and its options come in, a ``TrainingMethod`` goes out."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fxprune.keywords import unknown_argument
from fxprune.training.contract import TrainingMethod
from fxprune.training.methods.asni import asni
from fxprune.training.methods.gmp import gmp
from fxprune.training.methods.imp import imp
from fxprune.training.methods.rigl import rigl, sparse_evolution

METHODS: Mapping[str, Callable[..., TrainingMethod]] = {
    "asni": asni,
    "gmp": gmp,
    "imp": imp,
    "rigl": rigl,
    "set": sparse_evolution,
}
"""Name -> factory ``(sparsity, total, *, options)``; its signature says which options there are."""


ARGUMENTS = (
    "sparsity", "total", "example_inputs", "data", "loss_fn", "budget", "granularity", "exclude", "seed",
    "returns", "rewind", "checkpoint_dir", "checkpoint_every", "rules",
)  # fmt: skip
"""Arguments of a ``Pruner`` that are no options of methods."""


def options(name: str) -> dict[str, Any]:
    """The options of a training method and their defaults.

    >>> options("gmp")["begin"]
    0
    """
    parameters = inspect.signature(METHODS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def resolve(
    method: str | TrainingMethod,
    sparsity: float | None,
    total: int,
    given: Mapping[str, Any],
) -> TrainingMethod:
    """The method that ``method`` means; a ``TrainingMethod`` is returned as it is and takes no options.

    Raises ``ValueError`` for an unknown name, ``TypeError`` for an unknown option.
    """
    if isinstance(method, TrainingMethod):
        if given or sparsity is not None:
            raise TypeError(f"method {method.name!r} is a TrainingMethod already; set its options there")
        return method
    if not isinstance(method, str):
        raise TypeError(f"method={method!r}: expected one of {', '.join(METHODS)}, or a TrainingMethod")
    if method not in METHODS:
        near = difflib.get_close_matches(method.lower(), METHODS, n=2, cutoff=0.5) or list(METHODS)
        raise ValueError(
            f"method={method!r} is no training method; did you mean {' or '.join(map(repr, near))}? Those of"
            " fxprune.apply are criteria here: Pruner(model, 'gmp', criterion='snip')"
        )
    known = options(method)
    for option in given:
        if option not in known:
            owners = [other for other in METHODS if option in options(other)]
            raise unknown_argument(option, "Pruner", method, [*ARGUMENTS, *known], known, owners)
    return METHODS[method](sparsity, total, **given)
