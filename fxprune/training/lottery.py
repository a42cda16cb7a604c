"""Find lottery tickets: train, prune by magnitude, rewind, and train again."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from fxprune.keywords import refuse_unknown
from fxprune.progress import Display
from fxprune.request import Exclusion
from fxprune.sparsity.budget import Allocation
from fxprune.sparsity.masks import Masks
from fxprune.training.checkpoints import restore_states, set_random_state
from fxprune.training.numbers import fraction, integer
from fxprune.training.pruner import Pruner
from fxprune.training.saving import Saving

TrainFunction = Callable[..., Any]
"""``train_fn(model, run)`` or ``train_fn(model)``; what it returns is kept as the result of the round."""


@dataclass(frozen=True)
class Lottery:
    """Hold what a lottery leaves: the network after its last training, and how it went.

    ``results[r]``: what ``train_fn`` returned after r prunings; ``sparsities[r]``: at which sparsity.
    ``pruner``: sets the weights back, ``pruner.reinitialize(f"rewind:{k}")``.
    """

    pruner: Pruner
    results: list[Any]
    sparsities: list[float]

    @property
    def model(self) -> nn.Module:
        """The masked network, trained."""
        return self.pruner.model

    @property
    def masks(self) -> Masks:
        """The winning masks, by parameter name."""
        return self.pruner.masks


class Run:
    """One training of a lottery, as ``train_fn`` sees it.

    ``round``: 0 for the dense network, then the number of prunings so far.
    """

    def __init__(self, lottery: _Rounds, number: int) -> None:
        self.round = number
        self._lottery = lottery

    def attach(self, **objects: Any) -> int:
        """Names what the loop has besides the model, as :meth:`Pruner.resume`; the steps that are done.

        These are 0 in the first round, ``rewind_to`` in later ones (bring the data order and the learning
        rate there), and what a checkpoint says where a run that was killed goes on: the objects then have
        their old states.
        """
        return self._lottery.attach(objects)

    def step(self, at: int) -> None:
        """Tells that training step ``at`` of this round is done, in whatever unit ``rewind_to`` is."""
        self._lottery.step(at)


class _Rounds:
    """The state of a lottery: its pruner, its round, its results."""

    def __init__(self, pruner: Pruner, saving: Saving, rewind_to: int) -> None:
        self.pruner, self.saving, self.rewind_to = pruner, saving, rewind_to
        self.round = 0
        self.results: list[Any] = []
        self.sparsities: list[float] = []
        self.count = 0
        self.pending: dict[str, Any] | None = None
        self.rewound = rewind_to == 0

    def attach(self, objects: dict[str, Any]) -> int:
        self.saving.objects = objects
        if self.pending is not None and self.pending["in_round"]:
            restore_states(objects, self.pending["objects"], "checkpoint_dir")
            set_random_state(self.pending["random"])
            self.saving.done = int(self.pending["done"])
        self.pending = None
        return self.saving.done

    def step(self, at: int) -> None:
        integer("at", at, 1)
        if self.pending is not None and self.pending["in_round"]:
            raise RuntimeError("train_fn: call run.attach(optimizer=..., ...) before the first run.step")
        if at <= self.saving.done:
            raise ValueError(f"at={at!r}: step {self.saving.done} of this round is done already")
        self.saving.done = at
        if self.round == 0 and at == self.rewind_to:
            self.pruner.remember(at)
            self.rewound = True
        if at % self.saving.every == 0:
            self.save(in_round=True)

    def save(self, *, in_round: bool) -> None:
        if self.saving.store is None:
            return
        self.count += 1
        if not in_round:
            self.saving.objects = {}
        self.saving.write(
            self.count, self.pruner.model, self.pruner.state_dict(), in_round=in_round, round=self.round,
            results=self.results, sparsities=self.sparsities, rewound=self.rewound,
        )  # fmt: skip

    def resume(self) -> None:
        found = self.saving.latest()
        if found is None:
            return
        self.count, state = found
        self.pruner.model.load_state_dict(state["model"])
        self.pruner.load_state_dict(state["pruner"])
        self.round, self.rewound = int(state["round"]), bool(state["rewound"])
        self.results, self.sparsities = list(state["results"]), list(state["sparsities"])
        self.saving.done = int(state["done"])
        self.pending = state
        set_random_state(state["random"])


def lottery(
    model_fn: Callable[[], nn.Module],
    train_fn: TrainFunction,
    rounds: int,
    rate: float = 0.2,
    rewind_to: int = 0,
    *,
    example_inputs: Any = None,
    budget: Allocation | None = None,
    exclude: Exclusion | Iterable[Exclusion] = (),
    seed: int = 0,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: bool = True,
    **others: NoReturn,
) -> Lottery:
    """Prune by magnitude with rewinding: train, prune and rewind, ``rounds`` times; then train.

    After each training the fraction ``rate`` of the weights that are left goes, those smallest in magnitude
    over all layers, and the rest is set back to where it was after step ``rewind_to`` of the first training
    (Frankle et al. 2019, arXiv 1903.01611; 0 is the lottery ticket of arXiv 1803.03635).

    Args:
        model_fn: makes the network.
        train_fn: ``train_fn(model, run)`` trains ``model`` in place, with an optimiser of its own. It calls
            ``start = run.attach(optimizer=..., ...)`` once, goes on from step ``start``, and calls
            ``run.step(t)`` after each step or epoch t = start + 1, ...; ``train_fn(model)`` will do where
            nothing is rewound to a later step than 0.
        rounds, rate: number of prunings, one less than trainings; the fraction of the survivors that goes.
        rewind_to: the step of the first training to set back to, in the unit of ``run.step``.
        example_inputs, budget, exclude, seed: as for :func:`fxprune.apply`.
        checkpoint_dir: a folder; called again, a lottery that was killed goes on there, to the bit the same.
            Results of ``train_fn`` must then be numbers, text or tensors, or lists or dicts of such.
        checkpoint_every, progress: steps from one checkpoint to the next; a bar on stderr.

    Raises ``TypeError`` and ``ValueError``: arguments that do not fit, ``rewind_to`` that never came.

    >>> import torch
    >>> def train(model, run):
    ...     for step in range(run.attach(), 2): run.step(step + 1)
    >>> make = lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    >>> lottery(make, train, 2, 0.5, rewind_to=1, example_inputs=torch.ones(1, 4)).sparsities
    [0.0, 0.5, 0.75]
    """
    refuse_unknown(lottery, others)
    alone = _takes_model_only(train_fn)
    _check_makes_networks(model_fn)
    if integer("rewind_to", rewind_to, 0) and alone:
        raise ValueError(f"rewind_to={rewind_to!r}: train_fn must take (model, run) and call run.step(t)")
    pruner = Pruner(
        model_fn(), "imp", total=integer("rounds", rounds, 1), rate=fraction("rate", rate), seed=seed,
        example_inputs=example_inputs, budget=budget, exclude=exclude,
        checkpoint_dir=checkpoint_dir, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    state = _Rounds(pruner, pruner.without_saving(rewind_to=rewind_to, rate=rate), rewind_to)
    state.resume()
    left = range(state.round, rounds + 1)
    for number in Display(enabled=progress)(left, "lottery", len(left)):
        _train(state, train_fn, alone, last=number == rounds)
    return Lottery(pruner, state.results, state.sparsities)


def _train(state: _Rounds, train_fn: TrainFunction, alone: bool, *, last: bool) -> None:
    """Run one round: a training and, unless it is the last, pruning and rewinding."""
    pruner = state.pruner
    if len(state.results) > state.round:
        return  # a finished lottery, found again
    result = train_fn(pruner.model) if alone else train_fn(pruner.model, Run(state, state.round))
    if not state.rewound:
        raise ValueError(
            f"rewind_to={state.rewind_to!r}: train_fn never called run.step({state.rewind_to});"
            f" it came to step {state.saving.done}"
        )
    state.results.append(result)
    state.sparsities.append(pruner.sparsity)
    if not last:
        state.round += 1
        pruner.step(state.round)
        pruner.reinitialize(f"rewind:{state.rewind_to}")
    state.saving.done = 0 if last else state.rewind_to
    state.pending = None
    state.save(in_round=False)


def _check_makes_networks(model_fn: object) -> None:
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        kind = type(model_fn).__name__
        raise TypeError(f"model_fn: expected a function that makes the network, got a {kind}")


def _takes_model_only(train_fn: TrainFunction) -> bool:
    if not callable(train_fn):
        raise TypeError(f"train_fn={train_fn!r}: expected a function of (model, run)")
    signature = inspect.signature(train_fn)
    for number in (2, 1):
        try:
            signature.bind(*[None] * number)
        except TypeError:
            continue
        return number == 1
    raise TypeError(f"train_fn={train_fn!r}: expected a function of (model, run) or of (model)")
