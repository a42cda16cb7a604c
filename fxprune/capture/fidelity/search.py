"""One graph for training and evaluation, for every batch size and precision: checked, not assumed.

In: a model and its inputs. Out: a graph that does what the model does in either mode. The model is traced in
evaluation, and once more in training, with a larger batch and in another precision. Where the two traces
agree, they hold for all of that. Where they do not, each change is tried alone, and the place that
depends on it is resolved: a constant is chosen by a :class:`ModeSwitch`, a module stays whole, two
branches of the model itself are merged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from fxprune.capture.errors import TRACE_ERRORS, CaptureError, HookError, first_line, where
from fxprune.capture.fidelity import messages
from fxprune.capture.fidelity.carried_over import carried_over, larger_inputs
from fxprune.capture.fidelity.compare import (
    Differences,
    compare,
    computes_same_apart_from_order,
    same_but_for_numbers,
    take_regions,
)
from fxprune.capture.fidelity.faithful import Faithful
from fxprune.capture.fidelity.followed_types import resolve_types
from fxprune.capture.fidelity.guards import guard_constants, guard_decisions, guard_sizes, guarded_sizes
from fxprune.capture.fidelity.merge import merge
from fxprune.capture.fidelity.observers import find_observers
from fxprune.capture.fidelity.other_inputs import OTHER_TYPE, Inputs, extent, plain_values
from fxprune.capture.fidelity.places import inside, related, writers
from fxprune.capture.hooks import Hook, keeps_hooks
from fxprune.capture.leaves import is_leaf
from fxprune.capture.modes import Switches, evaluation_only
from fxprune.capture.module import CapturedModule
from fxprune.capture.tracer.isolation import ModelState
from fxprune.capture.tracer.memos import Cache, find_caches
from fxprune.capture.tracer.meta_values import Shadows
from fxprune.capture.tracer.questions import Answers
from fxprune.capture.tracer.sample_values import needs_numbers
from fxprune.capture.tracer.trace import Rehearsal, Trace, remove_dead_code, trace
from fxprune.capture.tracer.values import Values

__all__ = ["faithful_graph", "faithful_part"]


def faithful_graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    examples: Mapping[int, Tensor] = MappingProxyType({}),
) -> Faithful:
    """A graph of ``model`` that is right in both modes, at any batch size and in any precision.

    ``examples``: numbers of meta tensors among the arguments, by their ``id``.
    """
    return _Search(model, args, kwargs, examples, False).run()


def faithful_part(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Faithful:
    """A graph to take the place of ``model`` in a larger one, which :attr:`Faithful.limit` speaks of.

    Where it does not do what the model does in training it does what it does in evaluation, and does not
    raise. A model that was called last with inputs of this size may read what it made for them: it is looked
    at as after a call with larger ones, where that makes it write.
    """
    found = _Search(model, args, kwargs, {}, True).run()
    for larger in larger_inputs(Inputs(args, kwargs)) if found.limit else ():
        search = _Search(model, args, kwargs, {}, True, larger)
        base = search.attempt()
        if base is not None and base.changed:
            return search.run()
    return found


@dataclass
class _Search:
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    examples: Mapping[int, Tensor]
    part: bool
    before: Inputs | None = None
    whole: set[str] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)
    refusal: str = ""
    untraced: bool = False
    unmerged: str = ""
    carried: str = ""
    one_image_size: bool = False
    one_batch_size: bool = False
    frozen: bool = False
    observers: dict[Hook, nn.Module] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = ModelState(self.model)
        self.answers = Answers(type(self.model).__name__)
        self.paths = {id(module): path for path, module in self.model.named_modules()}

    def run(self) -> Faithful:
        self.caches = find_caches(self.model)
        emptied = self.attempt() if self.caches else None
        if emptied is None or not emptied.refilled:
            self.caches = []  # not computed by this run, or otherwise by now than what was kept
        self.observers, self.records = find_observers(self.model, self.paths, self.attempt)
        while True:
            base = self.attempt(strict=not self.apart)
            if self.join_again(base.reasons if base else {"": ""}) or base is None:
                continue
            self.forget_memos(base)
            if self.keep_whole({**base.reasons, **writers(base)}):
                continue
            others = self.other_numbers(base)
            if others is None:
                continue
            if self.part:
                self.carried = carried_over(base, self.attempt, Inputs(self.args, self.kwargs, self.examples))
            found = self.probe(base)
            if self.state.namespaces.rounded and self.follows_fractions(base):
                continue
            if not found:
                resolve_types(base, found)
                return self.finish(base, Switches(self.model), found, others)
            result = self.resolve(base, found, others)
            if result is not None:
                return result

    def probe(self, base: Trace) -> Differences:
        """Find what changes in training, at another batch size and in other types, and mind image sizes."""

        def changed(*, images: bool) -> Differences:
            probe = self.attempt(training=True, batch=True, types=True, images=images)
            found = compare(base, probe) if probe else Differences({""})
            take_regions(found)
            return found

        self.one_image_size = False
        if Inputs(self.args, self.kwargs).has_images():
            # Mostly nothing changes with all four at once, which is one trace less than images by themselves.
            found = changed(images=True)
            if not found:
                return found
            self.one_image_size = self.fixed_images(base)
        return changed(images=False)

    def resolve(self, base: Trace, together: Differences, others: Differences) -> Faithful | None:
        """Each change alone; None if another module has to stay whole and all starts again."""
        training = None if self.unmerged else self.attempt(training=True)
        if training:
            self.forget_memos(training, training=True)
        modes = compare(base, training) if training else Differences()
        take_regions(modes)
        switches = Switches(self.model)
        if training is None:
            self.no_training(base, switches)
        elif self.keep_whole({**training.reasons, **writers(training, messages.IN_TRAINING)}):
            return None
        elif self.keep_whole(dict.fromkeys(modes.modules - self.joined - {""}, "")):
            self.apart |= modes.modules - self.joined - {""}
            return None
        if not modes.modules and modes.constants == together.constants and not together.modules:
            # The mode alone explains all of it: the other changes changed nothing.
            resolve_types(base, together)
        else:
            if self.follows_int(base, training):
                return None
            together = self.fixed_batch(base)
            in_training = self.fixed_batch(training, training=True) if training else Differences()
            places = together.places | in_training.places
            if self.keep_whole(dict.fromkeys(places - {""}, messages.COUNTS_BATCH)):
                return None
            other = self.attempt(types=True)
            types = compare(base, other) if other else Differences()
            if self.keep_whole(dict.fromkeys(types.modules - {""}, "it does something else in other types")):
                return None
            if "" in types.modules:
                self.notes.setdefault("", "it does something else in other types; the graph holds for these")
            resolve_types(base, types)
        if training and modes.modules:
            if not self.merged(base, training, switches):
                return None
        else:
            for constant in modes.constants:
                switches.insert(constant.node, constant.path, constant.key, constant.second, constant.first)
        return self.finish(base, switches, together, others)

    def merged(self, base: Trace, training: Trace, switches: Switches) -> bool:
        """Whether the graph is that of both modes now; else all starts again, for this one has changed."""
        try:
            merge(self.model, base, training, switches)
        except CaptureError as error:
            if self.joined:
                self.whole |= self.joined
            else:
                self.unmerged = first_line(error)
            self.joined.clear()
            return False
        return True

    def follows_fractions(self, base: Trace) -> bool:
        """Whether ``int()`` of fractions is followed by now; else the graph holds for one batch size."""
        if self.follows_int(base, self.attempt(training=True)):
            return True
        self.hold_for_one_batch_size()
        return False

    def follows_int(self, base: Trace, training: Trace | None) -> bool:
        """Whether numbers went through ``int()`` in code that is known by now, so that all starts again.

        Code that tells what stands for ``int`` from ``int`` itself would go another way.
        """
        if not self.state.namespaces.follow():
            return False
        for before in (base, training):
            after = self.attempt(training=before is training) if before else None
            if before and not (after and same_but_for_numbers(before, after)):
                self.state.namespaces.give_up()
                break
        return True

    def no_training(self, base: Trace, switches: Switches) -> None:
        """Say that the graph is that of evaluation; where the model itself trains, the graph refuses to."""
        for guard in evaluation_only(self.model):  # the graph of a graph that was captured so
            switches.refuse_training(base.graph, guard.refusal)
            return
        untraced = bool(self.untraced or self.unmerged)
        reason = messages.no_training(untraced, self.unmerged or self.refusal)
        self.notes[""] = f"{reason}; the graph is that of evaluation"
        if not untraced or self.part:
            return
        self.notes[""] += f", and does not run in training: {messages.INSTEAD}"
        name = type(self.model).__name__
        switches.refuse_training(
            base.graph, f"{name}: {reason}, this graph is for evaluation: {messages.INSTEAD}"
        )

    def left_out(self) -> frozenset[Hook]:
        """The hooks that run with the graph and not in it: observers on what the graph calls."""

        def is_called(module: nn.Module) -> bool:
            path = self.paths[id(module)]
            return not path or path in self.whole or is_leaf(module) or keeps_hooks(module)

        return frozenset(hook for hook, module in self.observers.items() if is_called(module))

    def other_numbers(self, base: Trace) -> Differences | None:
        """Differences of a trace that reads other numbers from its inputs; None if all starts again.

        A module that does not follow the numbers is kept whole; from then on the model's own forward, if it
        does not, holds for these only.
        """
        if not base.reads:
            return Differences()
        found = self.attempt(numbers=plain_values(base.reads)) or self.attempt(numbers=())
        differences = compare(base, found) if found else Differences({base.path_of(x) for x in base.reads})
        if self.keep_whole(dict.fromkeys(differences.places - {""}, messages.COUNTS_VALUES)):
            return None
        if "" in differences.places and not self.frozen:
            self.frozen = True
            return None
        return differences

    def forget_memos(self, base: Trace, *, training: bool = False) -> None:
        """Attributes that a module writes do not matter if a second run, which finds them, does the same."""
        own_writes = base.hook_writes.keys() - self.records.keys()
        if not base.changed and not own_writes:
            return
        again = self.attempt(training=training, rehearsed=training)
        if again and not again.reasons and computes_same_apart_from_order(base, again):
            base.changed.clear()
            return
        places = compare(base, again).places | again.reasons.keys() if again else {""}
        others = [place for place in places if not any(related(place, path) for path in base.changed)]
        for path in own_writes if others else ():
            raise HookError(messages.hands_on(path, base.hook_writes[path]))
        for path in list(base.changed):
            if not any(related(place, path) for place in places):
                del base.changed[path]

    def fixed_dims(self, name: str, value: Tensor) -> list[int]:
        """The dimensions of an argument that the graph holds for one size of."""
        earlier = guarded_sizes(self.model.graph) if isinstance(self.model, CapturedModule) else set()
        fixed = {dim for argument, dim in earlier if argument == name}
        fixed |= set(extent(value)) if self.one_image_size else set()
        return sorted(fixed | ({0} if self.one_batch_size and value.dim() else set()))

    def fixed_images(self, base: Trace) -> bool:
        """Whether the graph holds for one size of image only though the model takes others."""
        larger = self.attempt(images=True)
        return larger is not None and bool(compare(base, larger))

    def fixed_batch(self, base: Trace, *, training: bool = False) -> Differences:
        """Find what a larger batch changes; note it if the model itself takes the batch size for constant."""
        larger = self.attempt(training=training, batch=True)
        found = compare(base, larger) if larger else Differences()
        if "" in found.places:
            self.hold_for_one_batch_size()
        return found

    def hold_for_one_batch_size(self) -> None:
        self.notes.setdefault("", messages.ONE_BATCH_SIZE)
        self.one_batch_size = True

    def keep_whole(self, reasons: Mapping[str, str]) -> bool:
        """Whether there is a module among them that was entered so far."""
        new = {path: reason for path, reason in reasons.items() if path and path not in self.whole}
        self.whole.update(new)
        self.notes.update(
            {path: reason for path, reason in reasons.items() if reason and path not in self.notes}
        )
        return bool(new)

    def join_again(self, reasons: Mapping[str, str]) -> bool:
        """Whether modules are whole no more, for their training, as what is around them cannot be traced so.

        They take an object that they change, a cache: what they do in either mode is merged where it is.
        """
        failing = {path for path in self.apart if "" in reasons or inside(path, set(reasons))}
        self.whole -= failing
        self.apart -= failing
        self.joined |= failing
        return bool(failing)

    def attempt(
        self,
        *,
        training: bool = False,
        batch: bool = False,
        types: bool = False,
        images: bool = False,
        numbers: Collection[Any] | None = None,
        strict: bool = False,
        rehearsed: bool | None = None,
        sizes: bool = False,
        given: Inputs | None = None,
        left_out: frozenset[Hook] | None = None,
    ) -> Trace | None:
        """A trace under the given changes, or None if the model does not accept them.

        ``rehearsed``: the mode of a run before, with the inputs of the model; ``sizes`` as in `Rehearsal`;
        ``given``: other inputs. ``left_out``: hooks that are not run, for a trial; by default those that
        :meth:`left_out` gives.
        The changes are those of :meth:`Inputs.changed`.
        """
        other = batch or types or images or numbers is not None
        inputs = given or Inputs(self.args, self.kwargs, self.examples)
        earlier = None
        if rehearsed is not None:
            earlier = Rehearsal(rehearsed, self.args, self.kwargs, sizes)
        elif self.before is not None:
            earlier = Rehearsal(False, self.before.args, self.before.kwargs)
        if other:
            inputs = inputs.changed(batch=batch, types=types, images=images, numbers=numbers)
        made_up = 1 if numbers is None else 2
        try:
            result = trace(
                self.model, inputs.args, inputs.kwargs, training=training, whole=frozenset(self.whole),
                shadows=Shadows(self.model, OTHER_TYPE if types else {}, self.known), state=self.state,
                left_out=self.left_out() if left_out is None else left_out, caches=self.caches,
                values=lambda: Values(self.answers, inputs.examples, made_up, self.frozen),
                rehearsed=earlier,
            )  # fmt: skip
        except TRACE_ERRORS as error:
            if strict and self.state.namespaces.give_up():
                return self.attempt(strict=True)
            if strict or (isinstance(error, HookError) and not other and left_out is None):
                raise
            self.refusal = f"{first_line(error)}, {where(error, self.model)}"
            self.untraced = isinstance(error, CaptureError) or needs_numbers(error)
            return None
        return None if other and not training and result.reasons.keys() - self.whole else result

    def finish(self, base: Trace, switches: Switches, larger: Differences, others: Differences) -> Faithful:
        """``larger`` compares ``base`` with a trace of larger inputs; ``others``, of other numbers."""
        name = type(self.model).__name__
        guard_decisions(base.graph, base.decisions, larger.pairs, name)
        guard_decisions(base.graph, base.decisions, others.pairs, name, "numbers in its inputs")
        remove_dead_code(base.graph)
        switches.drop_unused(base.graph)
        guard_constants(base.graph, name)
        guard_sizes(base.graph, self.fixed_dims, name)
        used = {str(node.target) for node in base.graph.nodes if node.op == "get_attr"}
        constants = {name: value for name, value in base.constants.items() if name in used}
        notes = messages.final_notes(self.notes, base, self.records)
        sizes = {"batch": self.one_batch_size, "image": self.one_image_size}
        fixed = next((f"its graph holds for one {kind} size" for kind, one in sizes.items() if one), "")
        extra = {**switches.modules, **constants}
        return Faithful(base.graph, extra, notes, self.left_out(), fixed, self.carried)
