"""Change the masks of a model while its training loop runs; the loop is the user's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxprune.lowering import Rules
from fxprune.methods import Problem, agree, get
from fxprune.request import Exclusion, Request, exclusions
from fxprune.rewrite import bare, put_masks, read, stamp
from fxprune.rewrite.files.tickets import centroids, whole
from fxprune.rewrite.masking.computed import present_weight, settled
from fxprune.sharded_types import is_dtensor
from fxprune.sparsity.budget import Allocation
from fxprune.sparsity.granularity import WEIGHT, Granularity
from fxprune.sparsity.masks import Masks, kept
from fxprune.training.checkpoints import Checkpoints
from fxprune.training.contract import Moment, TrainingMethod
from fxprune.training.methods import resolve
from fxprune.training.numbers import integer
from fxprune.training.open_masks import dense_gradients
from fxprune.training.preparation import (
    Returns,
    named_as_given,
    prepare,
    prepare_smaller,
    take_granularity,
    whole_cost,
    without_limit,
)  # fmt: skip
from fxprune.training.saving import Saving, own_rank, world_size
from fxprune.training.smaller import check_shrinks, compacted, followed, move
from fxprune.training.values import Values, put_back, to_centroids, values_of

Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Event:
    """One update: at which step, the sparsity after it, the weights kept, and how many went and came back."""

    at: int
    sparsity: float
    kept: int
    pruned: int
    grown: int


class Pruner:
    """Prunes ``model`` while somebody trains it.

    Args:
        model: any module; it is not changed, unless ``returns`` says so. If it was pruned before, that stays.
        method: "asni", "gmp", "imp", "set", "rigl", or a :class:`TrainingMethod`.
        sparsity: the fraction of the prunable weights, or of what ``of`` says, that is gone in the end; also
            called ``target``. ``asni`` and ``imp`` can do without, from options of their own.
        total: the number of steps or epochs of the training, in the unit that :meth:`step` counts.
        example_inputs, budget, granularity, exclude, seed, rules, data, loss_fn: as for ``fxprune.apply``;
            the last two for criteria that look at data.
        returns: what :attr:`model` is: "graph", a masked ``torch.fx.GraphModule``; "module", a masked copy of
            the model's own class; "inplace", the model itself, for frameworks that hold it already.
        rewind: steps before whose pruning the weights are kept, for ``reinitialize("rewind:k")``.
        checkpoint_dir: where :meth:`step` leaves checkpoints; :meth:`resume` goes on from the last.
        checkpoint_every: steps from one checkpoint to the next.
        method_options: the method's own, and those of channels: ``of="macs"``, ``at_most`` for ``sparsity``.

    Raises:
        TypeError, ValueError: an argument that does not fit, named, before any work.

    Pruned weights are zero at once and stay so under any optimiser, whose momenta and averages of them are
    cleared after its next step. Masks are buffers that change in place: compiled code stays valid. Processes
    that train together end with the same masks, which is checked.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruner = Pruner(net, "gmp", 0.75, total=3, example_inputs=torch.ones(2, 4))
    >>> for epoch in range(1, 4):
    ...     pruner.step(epoch)  # after the training of an epoch
    >>> pruner.sparsity
    0.75
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | TrainingMethod = "asni",
        sparsity: float | None = None,
        *,
        total: int,
        example_inputs: Any = None,
        data: Any = None,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        budget: Allocation | None = None,
        granularity: str | Granularity = "weight",
        exclude: Exclusion | Iterable[Exclusion] = (),
        seed: int = 0,
        returns: Returns = "graph",
        rewind: int | Iterable[int] = (),
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        rules: Rules | None = None,
        **method_options: Any,
    ) -> None:
        self.granularity = take_granularity(granularity, method_options)
        with named_as_given(sparsity, method_options) as target:
            if getattr(self.granularity, "at_most", None) is not None:
                ask = Request(
                    get("magnitude"), target or 0.5, data, loss_fn, "global", self.granularity, None,
                    exclusions(exclude), seed, None, "graph", "warn", rules=rules, asked=target is not None,
                )  # fmt: skip
                self.granularity, target = without_limit(model, example_inputs, ask)
            self.method = resolve(method, target, total, method_options)
        self.total = integer("total", total, 1)
        if self.method.begin is not None and self.granularity != WEIGHT:
            raise ValueError(f"granularity={granularity!r}: method {self.method.name!r} moves single weights")
        if "data" in self.method.needs and data is None:
            raise ValueError(f"method {self.method.name!r}: its criterion needs data=...")
        steps = (rewind,) if isinstance(rewind, int) else rewind
        self._rewind_steps = {integer("rewind", step, 0) for step in steps}
        allocation = self.method.budget if budget is None else budget
        self._inputs, self._recipes = example_inputs, list[dict[str, Any]]()
        self._wish = Request(
            get("magnitude"), self.method.target, data, loss_fn, allocation, self.granularity, None,
            exclusions(exclude), seed, None, returns, "warn", rules=rules,
        )  # fmt: skip
        self._take(prepare(model, example_inputs, self._wish, self.method))
        self._whole, self._generator = sum(self._final.sizes.values()), self._problem.generator
        self._cost = whole_cost(self._problem)
        self._kept: dict[int, Values] = {0: values_of(self.model)}
        self._handled = -1
        self.history: list[Event] = []
        facts = {"method": self.method.name, "total": total, "seed": seed, "budget": self._final.total,
                 "weights": self._whole}  # fmt: skip
        store = None if checkpoint_dir is None else Checkpoints(checkpoint_dir, rank=own_rank())
        self._saving = Saving(store, integer("checkpoint_every", checkpoint_every, 1), facts, total)
        self._dense = self._weights() if self.method.grown == "dense" else {}
        self._dense = {name: weight.clone() for name, weight in self._dense.items()}
        self._start = kept(self.masks)
        stamp(self.model, method=self.method.name, sparsity=self.method.target, seed=seed)
        if self.method.begin is not None:
            self._change(0, self.method.begin(self._moment(0, None)))

    @property
    def masks(self) -> Masks:
        """The masks of now, by parameter name; copies."""
        found = read(self.model)
        return {name: found[name] for name in self._final.sizes}

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is gone now."""
        return 1 - sum(kept(self.masks).values()) / self._whole

    def step(self, at: int, loss: Loss | None = None) -> None:
        """Tells that step or epoch ``at`` (1..``total``) of the training is done; call it last in each.

        Args:
            at: the number of the step or epoch; it may skip some, and what was due in between is caught up.
            loss: for "rigl": a function that runs the model on a batch and returns its loss. It is called
                when an update is due, with all masks open; statistics and random states stay as they are. It
                must run ``pruner.model``, compiled or not, and no ``DistributedDataParallel`` around it.

        Raises:
            ValueError: ``at`` is not after the last step, or ``loss`` is missing.
            RuntimeError: processes that train together have come to different masks.
        """
        integer("at", at, 0)
        if "gradients" in self.method.needs and loss is None:
            raise ValueError(f"loss=None: method {self.method.name!r} needs step(at, loss=...), a function "
                             "that returns the loss of a batch")  # fmt: skip
        self._saving.check_step(at)
        if at in self._rewind_steps and at not in self._kept:
            self.remember(at)
        due = self.method.due(at)
        if due is not None and due > self._handled:
            self._change(due, self.method.update(self._moment(due, loss)))
            self._handled = due
        self._saving.step(at, self.model, self.state_dict())

    def resume(self, **objects: Any) -> int:
        """Goes on from the last checkpoint, if there is one; call it once, before the loop.

        Args:
            objects: what the training loop has besides the model, by names of your choice: optimiser,
                scheduler, gradient scaler, the ``torch.Generator`` of a ``DataLoader``. Anything with
                ``state_dict`` and ``load_state_dict`` will do. Each checkpoint has their states, and those of
                the global random generators.

        Returns:
            The steps that are done, 0 for a fresh start: the next is one more.

        Raises:
            TypeError: an object without a state.
            ValueError: no checkpoint can be read, or the last is of another run.
        """

        def fit(state: Mapping[str, Any]) -> nn.Module:
            before = self.model
            if self._follow(state):
                move(objects.values(), before, self.model)
            return self.model

        return self._saving.resume(objects, fit, self.load_state_dict)

    def compact(self, *optimizers: torch.optim.Optimizer) -> nn.Module:
        """Makes the model smaller, and goes on from the same function: what no path uses any more is gone.

        Args:
            optimizers: those of the training, which become optimizers of what is left, in place; momenta and
                averages go along. The optimizers that :meth:`resume` was given need not be named.

        Returns:
            The new :attr:`model`, as from :func:`fxprune.compact`, masked where it has zeros still: put it
            into the loop, compiled and wrapped anew. ``sparsity`` remains that of the network that the
            pruner was made with; :meth:`reinitialize` knows the weights from here on only.

        Raises:
            ValueError: the method lets weights come back, or ``returns="inplace"``: the model cannot change
                its class.

        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruner = Pruner(net, "gmp", 0.5, total=2, example_inputs=torch.ones(2, 4), granularity="channel")
        >>> sgd = torch.optim.SGD(pruner.model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner.step(2)
        >>> pruner.compact(sgd).get_submodule("0").weight.shape
        torch.Size([4, 4])
        """
        check_shrinks(self.method, self._wish.returns, self.model, optimizers)
        before = self.model
        small, places = compacted(before, self._inputs)
        self._take(prepare_smaller(small, self._problem, self._wish))
        self._kept.clear()
        known = {id(thing): thing for thing in (*optimizers, *self._saving.objects.values())}
        move(known.values(), before, self.model, places)
        self._recipes = [one.to_json() for one in small.meta["fxprune"]["recipes"]]
        return self.model

    def without_saving(self, **facts: Any) -> Saving:
        """The pruner's checkpoints, handed over to a loop around it that writes them itself."""
        own = self._saving
        self._saving = Saving(None, own.every, own.facts, own.total)
        return Saving(own.store, own.every, {**own.facts, **facts})

    def remember(self, step: int) -> None:
        """Keeps the present weights, on the host, for ``reinitialize(f"rewind:{step}")``."""
        self._kept[integer("step", step, 0)] = values_of(self.model)

    def centroids(self) -> dict[str, tuple[float, float]]:
        """The means of each layer's negative and positive weights, by parameter name: 2 L numbers.

        (negative, positive), each 0.0 where there is no such weight (ASNI, algorithm 1, lines 13 and 15).
        """
        names = self._final.sizes
        return {name: pair for name, pair in centroids(self.model).items() if name in names}

    def reinitialize(self, start: str) -> nn.Module:
        """Sets the weights back, under the masks of now, in place; and returns the model.

        Args:
            start: "centroids": every weight that is kept becomes the mean of its layer's weights of its sign
                (of the positive ones, if it is exactly zero), biases 0, weights of norms 1. "original": all
                parameters and statistics as the model came. "rewind:k": as they were at step k, see
                ``rewind``.

        Raises ``ValueError`` for any other word, for a k whose weights were not kept, and for centroids of
        computed weights. Give the training that follows an optimiser of its own.
        """
        word, _, number = str(start).partition(":")
        if start == "centroids":
            to_centroids(self.model)
            return self.model
        if start != "original" and (word != "rewind" or not number.isdecimal()):
            raise ValueError(f"start={start!r}: expected 'centroids', 'original' or 'rewind:k'")
        step = int(number) if number else 0
        if step not in self._kept and self._recipes:
            raise ValueError(
                f"start={start!r}: compact() made a smaller network, which has no weights of that step"
            )
        if step not in self._kept:
            raise ValueError(
                f"start={start!r}: the weights of that step were not kept, only those of"
                f" {sorted(self._kept)}; make the Pruner with rewind={step}, or call remember({step}) then"
            )
        put_back(self.model, self._kept[step])
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """All that the pruner knows, for :meth:`load_state_dict`: plain values and tensors."""
        return {
            "version": 1,
            "facts": self._saving.facts,
            "handled": self._handled,
            "history": [asdict(event) for event in self.history],
            "masks": self.masks,
            "generator": self._generator.get_state(),
            "start": self._start,
            "kept": self._kept,
            "dense": self._dense,
            "recipes": self._recipes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the pruner of ``state`` was: its masks are set; weights are the model's own affair.

        Raises ``ValueError`` where ``state`` is of another method, model, length of training or seed.
        """
        if not isinstance(state, Mapping) or "facts" not in state:
            raise ValueError("state: not the state of a Pruner")
        self._saving.check_facts(state["facts"], "state")
        self._follow(state)
        self._handled = state["handled"]
        self.history = [Event(**event) for event in state["history"]]
        self._generator.set_state(state["generator"])
        self._start = dict(state["start"])
        self._kept = {int(step): dict(values) for step, values in state["kept"].items()}
        device = next(iter(self._weights().values())).device
        self._dense = {name: weight.to(device) for name, weight in state["dense"].items()}
        put_masks(self.model, state["masks"])

    def _take(self, problem: Problem) -> None:
        """Goes on with the model of ``problem``."""
        self._problem, self.model, self.graph = problem, problem.model, problem.graph
        self._final = problem.budget

    def _follow(self, state: Mapping[str, Any]) -> bool:
        """Makes the model as small as that of ``state``, if it is not; returns whether it was not."""
        recipes = state["recipes"]
        if recipes == self._recipes:
            return False
        if recipes[: len(self._recipes)] != self._recipes:
            raise ValueError("state: this pruner's model was compacted, and otherwise than that of the state")
        small = followed(self.model, self._inputs, recipes[len(self._recipes) :])
        names = dict(small.named_parameters())
        put_masks(small, {name: mask for name, mask in state["masks"].items() if name in names})
        self._take(prepare_smaller(small, self._problem, self._wish))
        self._kept.clear()
        self._recipes = list(recipes)
        return True

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(present_weight(self.model, name)) for name in self._final.sizes}

    def _twin(self) -> nn.Module:
        """The model without masks, for criteria that run it; sharded models cannot be copied."""
        if not any(is_dtensor(parameter) for parameter in self.model.parameters()):
            return settled(bare(self.model))
        if "data" in self.method.needs:
            raise ValueError(f"method {self.method.name!r}: its criterion runs the model, which is sharded")
        return self.model

    def _moment(self, at: int, loss: Loss | None) -> Moment:
        weights = self._weights()

        def gradients() -> dict[str, torch.Tensor]:
            assert loss is not None
            return dense_gradients(self.model, list(weights), loss)

        device = next(iter(weights.values())).device
        with torch.no_grad():
            problem = replace(
                self._problem,
                model=self._twin(),
                weights=weights,
                masks=self.masks,
                device=device,
                history={},
            )
        shrunk = self._cost / whole_cost(self._problem)
        return Moment(at, self._start, self._final, problem, gradients, self._whole, shrunk)

    def _change(self, at: int, masks: Masks) -> None:
        """Puts masks into the model, with the values of weights that come back, and notes it."""
        before = self.masks
        if world_size() > 1:
            agree(masks, dist.group.WORLD)  # type: ignore[arg-type]
        gone = {name: before[name] & ~mask for name, mask in masks.items()}
        back = {name: mask & ~before[name] for name, mask in masks.items()}
        for name, weight in self._weights().items() if self._dense else ():
            self._dense[name] = torch.where(gone[name], weight, self._dense[name])
        put_masks(self.model, masks)
        with torch.no_grad():
            for name in self._dense:
                parameter = self.model.get_parameter(name)
                parameter.copy_(torch.where(back[name], self._dense[name], parameter))
        numbers = kept(masks)
        for name, number in numbers.items():
            if not number and before[name].any():
                warnings.warn(f"layer collapse: at step {at} no weight of {name!r} is left", stacklevel=3)
        total = sum(numbers.values())
        moved = [sum(kept(some).values()) for some in (gone, back)]
        self.history.append(Event(at, 1 - total / self._whole, total, *moved))
