"""Explain an argument that nobody takes by the one that was meant. Plain words, no PyTorch."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["MEANT", "TRAINING_METHODS", "counted", "nearest", "refuse_unknown", "unknown_argument"]

TRAINING_METHODS = {
    "asni": "asni.asni",
    "gmp": "gmp.gmp",
    "imp": "imp.imp",
    "rigl": "rigl.rigl",
    "set": "rigl.sparse_evolution",
}
"""Methods that prune while a network trains -> file and function in ``fxprune/training/methods``."""

MEANT: Mapping[str, tuple[str, str]] = {
    "density": ("sparsity", "the fraction to remove, 1 - density"),
    "amount": ("sparsity", "the fraction to remove"),
    "ratio": ("sparsity", "the fraction to remove"),
    "pruning_ratio": ("sparsity", "the fraction to remove"),
    "target": ("sparsity", "the fraction to remove"),
    "target_sparsity": ("sparsity", "the fraction to remove"),
    "input_size": ("example_inputs", "a tensor such as torch.ones(2, 3, 224, 224)"),
    "input_shape": ("example_inputs", "a tensor such as torch.ones(2, 3, 224, 224)"),
    "inputs": ("example_inputs", "a tensor, a tuple or a dict"),
    "dataloader": ("data", "a pair (x, y), or an iterable of such batches"),
    "loader": ("data", "a pair (x, y), or an iterable of such batches"),
    "criterion": ("loss_fn", "a function of (output, target)"),
    "loss": ("loss_fn", "a function of (output, target)"),
    "ignored_layers": ("exclude", "names, patterns or module types"),
    "ignore": ("exclude", "names, patterns or module types"),
    "epochs": ("total", "the number of calls of step, of a fxprune.Pruner"),
    "steps": ("total", "the number of calls of step, of a fxprune.Pruner"),
    "inplace": ("returns", "returns='inplace'"),
    "pattern": ("granularity", "such as '2:4'"),
    "scope": ("budget", "'global', 'uniform', 'erk' or 'owl'"),
}
"""Names from other tools and papers -> the argument that says the same here, and a word about it."""


def nearest(name: str, accepted: Iterable[str], number: int = 3) -> list[str]:
    """Return the names that ``name`` may be a misspelling of, nearest first; none where none is near.

    >>> nearest("example_input", ["data", "example_inputs"])
    ['example_inputs']
    """
    plain = str(name).lower().replace("-", "_")
    return difflib.get_close_matches(plain, list(accepted), n=number, cutoff=0.6)


def counted(number: int, word: str) -> str:
    """Write a number of things.

    >>> counted(1, "step"), counted(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def refuse_unknown(function: Callable[..., Any], others: Mapping[str, Any], public: str = "") -> None:
    """``TypeError`` for arguments that ``function`` does not have, with the nearest that it has.

    ``public``: the name by which callers know the function, where that is not its own.

    >>> refuse_unknown(nearest, {"names": "x"})
    Traceback (most recent call last):
        ...
    TypeError: nearest has no argument 'names'; did you mean 'name'?
    """
    taken = inspect.signature(function).parameters.values()
    accepted = [one.name for one in taken if one.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in others:
        meant, word = MEANT.get(name, ("", ""))
        near = nearest(name, accepted, 1)
        if meant in accepted:
            hint = f"did you mean {meant!r}, {word}?"
        else:
            listed = f"its arguments: {', '.join(accepted)}" if accepted else "it takes none"
            hint = f"did you mean {near[0]!r}?" if near else listed
        raise TypeError(f"{public or function.__name__} has no argument {name!r}; {hint}")


def unknown_argument(
    name: str,
    function: str,
    method: str,
    accepted: Iterable[str],
    own: Iterable[str] = (),
    owners: Iterable[str] = (),
) -> TypeError:
    """Return the error for an argument that neither ``function`` nor its method has.

    Args:
        name: the argument.
        function: what was called.
        method: the name of the method.
        accepted: all arguments that there are.
        own: those of them that are options of the method.
        owners: other methods with an option of that name.

    >>> print(unknown_argument("amount", "apply", "snip", ["sparsity", "data"]))
    method 'snip' has no option 'amount', nor has apply; did you mean 'sparsity', the fraction to remove?
    """
    accepted, others = list(accepted), list(owners)
    meant, word = MEANT.get(name, ("", ""))
    near = nearest(name, accepted, 1)
    if meant in accepted or (meant == "total" and function == "apply"):
        hint = f"did you mean {meant!r}, {word}?"
    elif others:
        hint = f"methods that have it: {', '.join(others)}"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"its options: {', '.join(own) or 'none at all'}"
    return TypeError(f"method {method!r} has no option {name!r}, nor has {function}; {hint}")
