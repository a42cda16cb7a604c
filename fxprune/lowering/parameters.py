"""Name the parameters and buffers of a network, and say which of them can be pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fxprune.graph import ir

__all__ = ["PROJECTIONS", "Parameters"]

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Parameters:
    """Names of the network's parameters: tied ones share the first name; ``owners`` maps a name to its
    module.

    ``prunable`` holds the names of the real parameters of two or more axes, whatever module owns them: those
    that a contraction meets become kernels. ``overwritten`` are those whose numbers the network replaces,
    with the parameters that it computes these from.
    """

    names: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    owners: dict[str, tuple[str, nn.Module]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    prunable: set[str] = field(default_factory=set)
    all_names: dict[int, str] = field(default_factory=dict)  # buffers as well
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    overwritten: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, root: nn.Module) -> Parameters:
        table = cls()
        for path, module in root.named_modules(remove_duplicate=False):
            for leaf, state in (*module._parameters.items(), *module._buffers.items()):
                if state is not None:
                    name = table.all_names.setdefault(id(state), f"{path}.{leaf}" if path else leaf)
                    table.shapes[name] = tuple(state.shape)
            for leaf, tensor in module._parameters.items():
                if tensor is None:
                    continue
                name = f"{path}.{leaf}" if path else leaf
                first = table.names.setdefault(id(tensor), name)
                table.aliases.setdefault(first, [])
                if first == name:
                    table.owners[name] = (path, module)
                    table.tensors[name] = tensor
                elif name not in table.aliases[first]:
                    table.aliases[first].append(name)
                is_whole = not isinstance(module, ParametrizationList)  # else something is computed from it
                if tensor.dim() > 1 and (tensor.is_floating_point() or tensor.is_complex()) and is_whole:
                    table.prunable.add(first)
        return table

    def overwrite(self, tensor: Tensor, sources: Iterable[Tensor] = ()) -> None:
        """Note a parameter that the network overwrites with what it computes from ``sources``."""
        name = self.names.get(id(tensor))
        if name in self.prunable:
            known = (self.names.get(id(source)) for source in sources)
            self.overwritten[name] = tuple(source for source in known if source is not None)
            self.prunable.discard(name)

    def reference(self, tensor: Tensor, reader: nn.Module | None) -> ir.WeightRef | None:
        """The tensor as a weight operand, if it is a prunable parameter; ``reader`` is the module that reads
        it.
        """
        name = self.names.get(id(tensor))
        if name is None or name not in self.prunable:
            return None
        return ir.WeightRef(name, tuple(tensor.shape), direct=self.owners[name][1] is not reader)
