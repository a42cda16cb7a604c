"""Run a captured graph on inputs that are made up, which its checks of numbers need not like.

A run draws the same random numbers whenever it has the same seed, and leaves the generators as they were.
It leaves users' modules that are called as a whole as they were, too, for such modules may keep what they
compute.
Random numbers of one call are all the same, and always-on dropout drops nothing, so that a network with
fewer channels is given the same ones. Packed sequences are all as long as the longest one was in the
capture, as the graph's shapes say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.fidelity.stand_ins import with_argument, without_draws
from fxprune.capture.runner import NodeRunner
from fxprune.capture.tracer.isolation import ModelState, restore_rng, rng_state, seed_rng
from fxprune.capture.tracer.spelling import DRAWS
from fxprune.torch_private import check_number, pack_padded_sequence

__all__ = ["Unchecked"]


class Unchecked(NodeRunner):
    """An interpreter that passes over ``check_number``, with random numbers of ``seed``.

    Example:
        >>> import torch
        >>> graph = fx.Graph()
        >>> _ = graph.call_function(check_number, (False, "never true"))
        >>> _ = graph.output(None)
        >>> Unchecked(fx.GraphModule(torch.nn.Module(), graph)).run()
    """

    def __init__(self, gm: fx.GraphModule, seed: int = 0) -> None:
        super().__init__(gm)
        self.seed = seed
        self.draws = torch.Generator()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.draws.manual_seed(self.seed)
        devices = {p.device.index for p in self.module.parameters() if p.is_cuda}
        with _seeded(self.seed, sorted(devices)), _state_kept(self.module):
            return super().run(*args, **kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.target is pack_padded_sequence and "val" in n.meta:
            padded, lengths, *rest = args
            args = (padded, torch.full_like(lengths, n.meta["val"][1].shape[0]), *rest)
        if switched := without_draws(n):
            args, kwargs = with_argument(args, kwargs, *switched)
        return args, kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is check_number:
            return None
        return self._one_number(getattr(target, "__name__", ""), super().call_function(target, args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._one_number(target, super().call_method(target, args, kwargs))

    def _one_number(self, name: str, result: Any) -> Any:
        """The result of a call; one number throughout if it is drawn, of which whole ones stay."""
        if name not in DRAWS or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        return result.fill_(float(torch.rand((), generator=self.draws)))


@contextmanager
def _seeded(seed: int, devices: list[int]) -> Iterator[None]:
    """Seed the generators of the processor, of some CUDA devices, of Python and of numpy; restore them."""
    others = rng_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            seed_rng(seed)
            yield
    finally:
        restore_rng(others)


@contextmanager
def _state_kept(gm: nn.Module) -> Iterator[None]:
    """Give users' modules that a graph calls all back that they write: attributes, and numbers in place."""
    assert isinstance(gm, fx.GraphModule)
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    own = [
        module
        for path in called
        if not type(module := gm.get_submodule(path)).__module__.startswith(("torch.", "fxprune."))
    ]
    states = [ModelState(module) for module in own]
    tensors = {id(x): x for module in own for x in (*module.parameters(), *module.buffers())}
    numbers = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    try:
        yield
    finally:
        for state in states:
            state.restore()
        with torch.no_grad():
            for tensor, old in numbers:
                tensor.copy_(old)
