"""Find the weights of a model that cannot be captured: run it, and see which parameters its products meet.

A model and its inputs come in. A :class:`ChannelGraph` goes out that has the kernels of those parameters, and
one opaque op for all that happens between input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.graph import ir
from fxprune.lowering.parameters import Parameters
from fxprune.torch_private import ConvTransposeNd, pytree

__all__ = ["graph_of_run"]

CONTRACTIONS = frozenset(
    """linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul
    __matmul__ __rmatmul__ mm bmm mv addmm addmv baddbmm addbmm einsum tensordot _grouped_mm grouped_mm
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell multi_head_attention_forward
    deform_conv2d""".split()
)
"""Names of the functions that multiply data with weights."""


class Meeting(TorchFunctionMode):
    """Note the parameters that products are given, whole, in part or transposed."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.parameters = parameters
        self.stack: list[nn.Module] = []
        self.met: dict[str, bool] = {}  # whether another module than its owner read it
        # Memory that an assignment to ``.data`` gives back would soon be that of another tensor: it is kept.
        self.kept = [tensor.untyped_storage() for tensor in parameters.tensors.values()]
        self.homes = {_storage(tensor): name for name, tensor in parameters.tensors.items()}

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in CONTRACTIONS:
            for leaf in pytree.tree_leaves((args, kwargs or {})):
                if not isinstance(leaf, Tensor):
                    continue
                # By itself, and by its memory: what it was assigned may be another parameter.
                for name in {self.parameters.names.get(id(leaf)), self.homes.get(_storage(leaf))}:
                    if name in self.parameters.prunable:
                        own = bool(self.stack) and self.stack[-1] is self.parameters.owners[name][1]
                        self.met[name] = self.met.get(name, False) or not own
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(module)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()


class _Numbers:
    """Draw numbers for tensors that have none, where the parameters of a model are."""

    def __init__(self, model: nn.Module) -> None:
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, value: Tensor) -> Tensor:
        if not value.is_meta:
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=self.device)
        drawn = torch.randn(value.shape, generator=self.generator)
        return drawn.to(self.device, value.dtype)


def _storage(tensor: Tensor) -> int:
    home: int = tensor.untyped_storage()._cdata
    return home


def graph_of_run(model: nn.Module, args: Any, kwargs: Any, reason: str) -> ir.ChannelGraph:
    """Run ``model`` in evaluation mode, without gradients, and list the weights that it multiplies with.

    Those that it overwrites in each call, whatever they held, are no kernels, but are named as such.

    Args:
        model: a private copy, for buffers and parameters may change.
        args, kwargs: of its ``forward``. Tensors on the meta device are replaced by random numbers, or by
            zeros where they are whole.
        reason: why there is no graph, for the opaque op.

    Example:
        >>> graph = graph_of_run(nn.Linear(4, 3), (torch.ones(2, 4),), {}, "for the example")
        >>> list(graph.kernels), [op.kind for op in graph.ops]
        (['weight'], ['Source', 'Opaque', 'Sink'])
    """
    parameters = Parameters.of(model)
    meeting = Meeting(parameters)
    hooks = [
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(meeting.enter, prepend=True),
            module.register_forward_hook(meeting.leave),
        )
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), meeting:
            numbers = pytree.tree_map_only(Tensor, _Numbers(model), (args, kwargs))
            tensors = parameters.tensors.items()
            before = {name: tensor.clone() for name, tensor in tensors if name in parameters.prunable}
            model(*numbers[0], **numbers[1])
            changed = [name for name in before if _differ(name, before, parameters)]
            overwritten = _overwritten(changed, parameters, lambda: model(*numbers[0], **numbers[1]))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    source = ir.Source(ir.Value(0, (), True), (), "input", "")
    opaque = ir.Opaque(ir.Value(1, (), True), (source.output,), "model", "", reason=reason)
    sink = ir.Sink(ir.Value(2, (), True), (opaque.output,), "output", "")
    met = {name: direct for name, direct in meeting.met.items() if name not in overwritten}
    kernels = {kernel.name: kernel for kernel in _kernels(parameters, met)}
    return ir.ChannelGraph(
        (source, opaque, sink), kernels, 1, type(model).__name__, overwritten=dict.fromkeys(overwritten, ())
    )


def _differ(name: str, values: Mapping[str, Tensor], parameters: Parameters) -> bool:
    return not torch.equal(values[name], parameters.tensors[name])


def _overwritten(names: Iterable[str], parameters: Parameters, run: Callable[[], Any]) -> list[str]:
    """Of parameters that a run has changed, those of which a run from zeros does not leave zeros."""
    after = {name: parameters.tensors[name].clone() for name in names}
    if not after:
        return []
    for name in after:  # in memory of its own: what was assigned may be that of another parameter
        parameters.tensors[name].data = torch.zeros_like(after[name])
    run()
    # A norm of zeros is none: what is divided by it is no number.
    return [name for name in after if bool(parameters.tensors[name].nan_to_num(0.0, 0.0, 0.0).any())]


def _kernels(parameters: Parameters, met: dict[str, bool]) -> Iterator[ir.KernelSet]:
    for name in (name for name, tensor in parameters.tensors.items() if name in met and tensor.numel()):
        path, owner = parameters.owners[name]
        shape, layer = parameters.tensors[name].shape, name.rpartition(".")[0] or name
        transposed = isinstance(owner, ConvTransposeNd)
        groups: Any = getattr(owner, "groups", 1)
        groups = groups if isinstance(groups, int) else 1
        into, out = (0, 1) if transposed else (1, 0)
        yield ir.KernelSet(
            name=name,
            shape=shape,
            in_space=ir.Space(f"{layer} in", shape[into] * (1 if transposed else groups)),
            out_space=ir.Space(layer, shape[out] * (groups if transposed else 1)),
            live_taps=torch.ones(shape[2:], dtype=torch.bool),
            groups=groups,
            owner=path,
            uses=1,
            macs=0,
            transposed=transposed,
            direct=met[name],
            aliases=tuple(parameters.aliases[name]),
        )
