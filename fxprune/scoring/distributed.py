"""Score by several processes: each sees its share of the data, and all end with the same masks.

Gradients become means over the processes. Where parameters themselves are sharded (FSDP2), gradients are
computed in the sharded model, and every process handles the rows that it owns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from fxprune.sharded_types import is_dtensor
from fxprune.sparsity.masks import Masks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_T = TypeVar("_T")


def everybody() -> dist.ProcessGroup | None:
    """Return the processes that work together: all of them, where there are several."""
    running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if running else None


def average(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace tensors by their means over the processes of ``group``, in place; ``None`` changes nothing."""
    if group is None:
        return
    size = dist.get_world_size(group)
    gpu = dist.get_backend(group) == "nccl"
    for tensor in tensors:
        # Gradients that are kept on the host travel through the device.
        travelling = tensor.cuda() if gpu and not tensor.is_cuda else tensor.contiguous()
        dist.all_reduce(travelling, group=group)
        tensor.copy_(travelling.div_(size))


def gathered(value: _T, group: dist.ProcessGroup) -> list[_T]:
    """Return the ``value`` of every process of ``group``, in the order of their ranks."""
    found: list[_T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def largest(number: int, group: dist.ProcessGroup | None) -> int:
    """Return the largest ``number`` of all processes of ``group``; for ``None``, this process's own."""
    if group is None:
        return number
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    own = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(own, dist.ReduceOp.MAX, group=group)
    return int(own)


def average_differentiably(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Compute the mean over the processes; gradients flow back to all of them."""
    if group is None:
        return tensor
    summed: torch.Tensor = _AllReduce.apply(tensor, group)
    return summed / dist.get_world_size(group)


class _AllReduce(torch.autograd.Function):
    """Sum over processes; the derivative is the sum over processes again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, tensor: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return _AllReduce.apply(gradient, ctx.group), None  # type: ignore[attr-defined]


def agree(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup, what: str = "masks") -> None:
    """Raise ``RuntimeError`` on every process of ``group`` unless all of them hold the same tensors.

    ``what``: the word for these in the message.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).long()
    own = own.cuda() if dist.get_backend(group) == "nccl" else own
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    different = [rank for rank, other in enumerate(everyone) if not torch.equal(other, everyone[0])]
    if different:
        raise RuntimeError(
            f"{what} of ranks {different} differ from those of rank 0; give every process the same model, "
            "options and seed"
        )


def local_rows(
    model: torch.nn.Module, names: Iterable[str]
) -> tuple[dict[str, torch.Tensor], dist.ProcessGroup]:
    """Return this process's rows of sharded parameters, and the group over which they are split.

    They share memory with the model. Raises ``ValueError`` for parameters that are not sharded over rows by
    ``fully_shard``, or not all over the same processes.
    """
    found: dict[str, torch.Tensor] = {}
    group: dist.ProcessGroup | None = None
    for name in names:
        parameter = model.get_parameter(name)
        if not is_dtensor(parameter) or not _is_by_rows(parameter):
            how = parameter.placements if is_dtensor(parameter) else "not at all"
            raise ValueError(
                f"model: {name!r} has to be split over its rows, as fully_shard does it, but is split {how}; "
                "call fully_shard on the root too, or exclude the parameter"
            )
        found[name] = parameter.to_local().detach()
        own = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
        if group is not None and own != group:
            raise ValueError(f"model: {name!r} is split over other processes than the parameters before it")
        group = own
    if group is None:
        raise ValueError("no sharded parameters were named")
    return found, group


def _is_by_rows(parameter: DTensor) -> bool:
    """Return whether rows are split along the last dimension of the mesh, and copied along the others."""
    from torch.distributed.tensor import Shard

    *copies, split = parameter.placements
    return split == Shard(0) and all(placement.is_replicate() for placement in copies)


def as_dtensors(masks: Masks, model: torch.nn.Module) -> dict[str, DTensor]:
    """Return local masks as DTensors that are laid out like the model's parameters."""
    from torch.distributed.tensor import DTensor

    whole = {}
    for name, mask in masks.items():
        like = model.get_parameter(name)
        assert is_dtensor(like)
        whole[name] = DTensor.from_local(
            mask, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return whole


@contextmanager
def holding(
    model: torch.nn.Module, rows: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
    """Put ``rows`` in place of a sharded model's own; put its values and gradients back afterwards.

    Yields a function that returns the local gradients, which FSDP makes means over the processes.
    """
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    places, _ = local_rows(model, rows)
    before = {name: place.clone() for name, place in places.items()}

    def found() -> dict[str, torch.Tensor]:
        return {name: _local(parameters[name].grad, place) for name, place in places.items()}

    try:
        for name, place in places.items():
            place.copy_(rows[name].detach())
        for parameter in parameters.values():
            parameter.grad = None
        yield found
    finally:
        for name, place in places.items():
            place.copy_(before[name])
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]


def _local(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a gradient, zeros if there is none."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_local() if is_dtensor(gradient) else gradient
