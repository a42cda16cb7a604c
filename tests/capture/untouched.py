"""Check that capture leaves a model as it was: its results, its state, and all that its code can reach."""

import copy
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from capture.faithful import tensors
from fxprune.capture import CaptureError, capture
from fxprune.capture.tracer.traced_numbers import TracedFloat, TracedInt


@contextmanager
def nothing_shape_only_left() -> Iterator[None]:
    """Fail if what runs inside leaves a tensor on the meta device, or a traced number, alive."""
    gc.freeze()  # hide from the search what is alive now
    try:
        yield
        gc.collect()
        left = [x for x in gc.get_objects() if type(x) in (TracedInt, TracedFloat) or is_meta(x)]
        assert not left, "something that has no numbers is still reachable"
    finally:
        gc.unfreeze()


def is_meta(value: Any) -> bool:
    return issubclass(type(value), Tensor) and Tensor.device.__get__(value).type == "meta"


def outputs(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...], *, training: bool) -> list[Tensor]:
    """Return what the model returns under a seed."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seed()
    try:
        model.train(training)
        with torch.no_grad():
            result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
        now = dict(model.named_buffers())
        for name, buffer in buffers.items():
            if now[name].shape == buffer.shape:
                now[name].copy_(buffer)
    return tensors(result)


def seed() -> None:
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def random_states() -> tuple[Any, ...]:
    kind, key, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, key.tolist(), rest


def assert_untouched(
    build: Callable[[], nn.Module], inputs: dict[str, Any] | tuple[Any, ...], *, fresh_first: bool = False
) -> None:
    """Capture a fresh model and one that has run: both compute the same as one that was never captured.

    ``fresh_first``: a first run fills a cache that all models share, so that the capture comes before it.
    """
    seed()
    model = build()
    wanted: dict[bool, list[Tensor]] = {}
    for _ in range(2):
        if wanted or not fresh_first:
            runs = {training: outputs(model, inputs, training=training) for training in (False, True)}
            wanted = wanted or runs
            assert_captured_untouched(model, inputs)
        if not fresh_first:
            seed()
            model = build()
        assert_captured_untouched(model, inputs)
        for training in (False, True):
            got = outputs(model, inputs, training=training)
            want = wanted.setdefault(training, got)
            assert len(got) == len(want)
            assert all(torch.equal(a, b) or (a != a).any() for a, b in zip(got, want, strict=True))


def assert_untouched_before_and_after_a_run(
    build: Callable[[], nn.Module], inputs: dict[str, Any] | tuple[Any, ...]
) -> tuple[list[str], list[str]]:
    """A model captured when fresh computes what one does that was never captured.

    Returns the modules that the graph calls, of a model that was fresh and of one that has run.
    """
    seed()
    model = build()
    twin = copy.deepcopy(model)
    wanted = [outputs(twin, inputs, training=training) for training in (False, True)]
    fresh = assert_captured_untouched(model, inputs)
    for training, want in zip((False, True), wanted, strict=True):
        got = outputs(model, inputs, training=training)
        assert len(got) == len(want)
        assert all(torch.equal(a, b) or (a != a).any() for a, b in zip(got, want, strict=True))
    return fresh, assert_captured_untouched(model, inputs)


def assert_captured_untouched(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...]) -> list[str]:
    """State, modes and random numbers are as before, and nothing shape-only is left.

    Returns the modules that the graph calls, or the error of a model that is refused.
    """
    seed()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    draws = random_states()
    with warnings.catch_warnings(), nothing_shape_only_left():
        warnings.simplefilter("ignore")
        try:
            graph = capture(model, inputs).graph
            called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
            del graph
        except CaptureError as error:
            called = [str(error)]
    assert random_states() == draws
    assert [module.training for module in model.modules()] == modes
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], value) for name, value in state.items())
    return called
