"""Run a captured graph on inputs that are made up, which its checks of numbers need not like.

A run draws the same random numbers whenever it has the same seed, and leaves the generators as they were.
It leaves users' modules that are called as a whole as they were, too, for such modules may keep what they
compute.
Random numbers of one call are all the same, so that a network with fewer channels is given the same ones.
They are large in a run of an even seed and small in one of an odd seed: a comparison with them goes either
way in two runs, and nothing that they make is a constant. Dropout multiplies by such a number.
Packed sequences are all as long as the longest one was in the capture, as the graph's shapes say.
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
from fxprune.capture.tracer.spelling import DRAWS, called, changes_input
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
        return None if target is check_number else super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        drops = self._drops(n)
        result = super().run_node(n)
        if not isinstance(result, torch.Tensor):
            return result
        name = called(n) if n.op in ("call_function", "call_method") else ""
        if drops:
            return result.mul_(self._number()) if changes_input(n) else result * self._number()
        if name in ("randint", "randint_like"):
            return result.fill_(self._whole_number(n))
        if name in DRAWS and result.is_floating_point():
            signed = name.startswith(("normal", "randn"))
            return result.fill_(self._number(coin=name.startswith("bernoulli"), signed=signed))
        return result

    def _drops(self, n: fx.Node) -> bool:
        """Whether a node drops at random, by the argument that it is given in this run."""
        switched = without_draws(n)
        if switched is None:
            return False
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        key, off = switched
        return bool((kwargs[key] if isinstance(key, str) else args[key]) != off)

    def _number(self, *, coin: bool = False, signed: bool = False) -> float:
        """A number in place of those that one call draws, at one end of what it may draw."""
        large = self.seed % 2 == 0
        if coin:
            return float(large)
        near = 0.1 * float(torch.rand((), generator=self.draws))
        return 1 - near if large else near - 1 if signed else near + 0.001

    def _whole_number(self, n: fx.Node) -> int:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        ends = [x for x in (*args, kwargs.get("low"), kwargs.get("high")) if isinstance(x, int)]
        return ends[-1] - 1 if self.seed % 2 == 0 else ends[0] if len(ends) > 1 else 0


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
