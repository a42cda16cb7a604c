"""When a run is saved and how it goes on: the state of everything that trains comes in, and comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxprune.rewrite.masking.parameters import unwrap
from fxprune.training.checkpoints import (
    Checkpoints,
    check_attachable,
    random_state,
    restore_states,
    set_random_state,
    states_of,
)


class Saving:
    """The checkpoints of one training loop: what is attached, which step is done, of which run they are.

    ``store`` is None where nothing is written. ``facts`` tells runs apart. Beyond step
    ``total`` a warning is due.
    """

    def __init__(
        self, store: Checkpoints | None, every: int, facts: Mapping[str, Any], total: int | None = None
    ) -> None:
        self.store = store
        self.every = every
        self.facts = dict(facts)
        self.objects: dict[str, Any] = {}
        self.done = 0
        self.resumed = False
        self.total = total
        self.warned = False

    def check_step(self, at: int) -> None:
        """Raises where ``step(at)`` comes out of order, or would write over a run that was not resumed."""
        if at <= self.done and (at or self.done):
            raise ValueError(f"at={at!r}: step {self.done} is done already; steps count up from 1")
        if self.total is not None and at > self.total and not self.warned:
            self.warned = True
            warnings.warn(
                f"at={at}: beyond total={self.total}, where the schedule ends; count in the unit of total, or"
                " make the Pruner with as many steps as the training has",
                stacklevel=3,  # the line that called step
            )
        if self.store is not None and not self.resumed:
            raise RuntimeError("checkpoint_dir: call resume(optimizer=..., ...) before the first step")

    def check_facts(self, facts: Mapping[str, Any], where: str) -> None:
        """``ValueError`` unless ``facts`` are those of this run."""
        for key in {**self.facts, **facts}:
            if self.facts.get(key) != facts.get(key):
                raise ValueError(
                    f"{where}: of another run, with {key}={facts.get(key)!r}, not {self.facts.get(key)!r}"
                )

    def step(self, at: int, model: nn.Module, state: Mapping[str, Any], **more: Any) -> None:
        """Notes that step ``at`` is done, and writes a checkpoint if it is time."""
        self.done = at
        if self.store is not None and at % self.every == 0:
            self.write(at, model, state, **more)

    def write(self, number: int, model: nn.Module, state: Mapping[str, Any], **more: Any) -> None:
        """Writes checkpoint ``number``."""
        assert self.store is not None
        self.store.save(
            number,
            {
                "facts": self.facts,
                "done": self.done,
                "model": dict(unwrap(model).state_dict()),
                "pruner": dict(state),
                "objects": states_of(self.objects),
                "random": random_state(),
                **more,
            },
        )

    def resume(
        self,
        objects: dict[str, Any],
        fit: Callable[[Mapping[str, Any]], nn.Module],
        load: Callable[[Mapping[str, Any]], None],
    ) -> int:
        """Restores the last checkpoint into the model, ``objects`` and through ``load``; the steps done.

        ``fit`` takes the pruner's state and returns the model, of the shapes that it had then.
        """
        check_attachable(objects)
        self.objects, self.resumed = objects, True
        found = self.latest()
        if found is None:
            return 0
        number, state = found
        assert self.store is not None
        where = str(self.store.path(number))
        unwrap(fit(state["pruner"])).load_state_dict(state["model"])
        load(state["pruner"])
        restore_states(objects, state["objects"], where)
        set_random_state(state["random"])
        self.done = int(state["done"])
        return self.done

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The last checkpoint that every process can read, checked to be of this run."""
        if self.store is None:
            return None
        found = self.store.latest()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A process may have died just before it wrote what another has written.
            common = torch.tensor(-1 if found is None else found[0])
            common = common.cuda() if dist.get_backend() == "nccl" else common
            dist.all_reduce(common, op=dist.ReduceOp.MIN)
            found = self.store.latest(at_most=int(common)) if int(common) >= 0 else None
        if found is not None:
            where = str(self.store.path(found[0]))
            if not {"facts", "done", "model", "pruner", "objects", "random"} <= found[1].keys():
                raise ValueError(f"{where}: a checkpoint, but not of a training run")
            self.check_facts(found[1]["facts"], where)
        return found


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Return the number of this process among those that train together."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
