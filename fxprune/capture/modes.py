"""The modules that capture adds: a choice between two values, or two pieces of code, by the training flag."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxprune.torch_private import check_number

__all__ = ["ModeBranch", "ModeSwitch", "Switches", "evaluation_only"]

GUARD = "mode_guard"


class ModeSwitch(nn.Module):
    """Returns its first argument in training, its second in evaluation. It has no state.

    ``refusal``: the error of a graph that holds in evaluation alone, which it keeps from training.

    Example:
        >>> switch = ModeSwitch()
        >>> switch(0.1, 0.0), switch.eval()(0.1, 0.0)
        (0.1, 0.0)
    """

    refusal = ""

    def __init__(self, refusal: str = "") -> None:
        super().__init__()
        self.refusal = refusal

    def forward(self, when_training: Any, when_evaluating: Any) -> Any:
        return when_training if self.training else when_evaluating


class ModeBranch(nn.Module):
    """Runs its first part in training, its second in evaluation, on the same inputs. It has no state.

    Example:
        >>> ModeBranch(nn.ReLU(), nn.Identity()).eval()("as it was")
        'as it was'
    """

    def __init__(self, when_training: nn.Module, when_evaluating: nn.Module) -> None:
        super().__init__()
        self.when_training = when_training
        self.when_evaluating = when_evaluating

    def forward(self, *inputs: Any) -> Any:
        return self.when_training(*inputs) if self.training else self.when_evaluating(*inputs)


class Switches:
    """The modules that a graph needs besides the model's own: one switch for every flag the model reads."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}

    def add(self, branch: ModeBranch) -> str:
        """The name under which the graph calls ``branch``."""
        name = f"mode_branch{len(self.modules)}"
        while hasattr(self.model, name):
            name += "_"
        self.modules[name] = branch
        return name

    def insert(
        self, node: fx.Node, path: str, key: tuple[Any, ...], when_training: Any, otherwise: Any
    ) -> None:
        """Replace the constant argument of ``node`` that ``key`` leads to by a choice."""
        chosen = self.earlier(node, when_training, otherwise)
        if chosen is None:
            with node.graph.inserting_before(node):
                chosen = self.choose(node.graph, path, when_training, otherwise)
        args, kwargs = _replaced((node.args, node.kwargs), key, chosen)
        node.args, node.kwargs = args, kwargs

    def choose(self, graph: fx.Graph, path: str, when_training: Any, otherwise: Any) -> fx.Node:
        """A node for the choice, by the flag of the module at ``path``."""
        name = "_".join(("mode_switch", *path.split("."))) if path else "mode_switch"
        while name not in self.modules and hasattr(self.model, name):
            name += "_"
        if name not in self.modules:
            self.modules[name] = ModeSwitch().train(self.model.get_submodule(path).training)
        node = graph.create_node("call_module", name, (when_training, otherwise))
        node.meta["val"] = fx.node.map_arg(otherwise, lambda x: x.meta["val"])
        return node

    def earlier(self, node: fx.Node, when_training: Any, otherwise: Any) -> fx.Node | None:
        """The switch of an earlier capture that this constant came out of."""
        before = node.prev
        while before.op != "root":
            if before.op == "call_module" and before.args == (when_training, otherwise):
                module = (
                    self.model.get_submodule(str(before.target))
                    if before.target not in self.modules
                    else None
                )
                if isinstance(module, ModeSwitch):
                    return before
            before = before.prev
        return None

    def refuse_training(self, graph: fx.Graph, told: str) -> None:
        """Make the graph raise ``AssertionError`` in training, for it is that of evaluation alone."""
        name = GUARD
        while hasattr(self.model, name):
            name += "_"
        self.modules[name] = ModeSwitch(told).train(self.model.training)
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            switch = graph.create_node("call_module", name, (False, True))
            check = graph.call_function(check_number, (switch, told))
        switch.meta["val"], check.meta["val"] = True, None

    def drop_unused(self, graph: fx.Graph) -> None:
        """Remove calls of switches whose choice nobody reads."""
        for node in reversed(graph.nodes):
            if node.op == "call_module" and not node.users and self._is_switch(str(node.target)):
                graph.erase_node(node)

    def _is_switch(self, name: str) -> bool:
        return isinstance(self.modules.get(name) or self.model.get_submodule(name), ModeSwitch)


def evaluation_only(model: nn.Module) -> list[ModeSwitch]:
    """List the switches that keep a graph from running in training; in evaluation mode they let it."""
    return [module for module in model.modules() if isinstance(module, ModeSwitch) and module.refusal]


def _replaced(value: Any, key: tuple[Any, ...], new: Any) -> Any:
    if not key:
        return new
    if isinstance(value, slice):
        parts = {part: getattr(value, part) for part in ("start", "stop", "step")}
        parts[key[0]] = _replaced(parts[key[0]], key[1:], new)
        return slice(*parts.values())
    if isinstance(value, dict):
        return {**value, key[0]: _replaced(value[key[0]], key[1:], new)}
    items = list(value)
    items[key[0]] = _replaced(items[key[0]], key[1:], new)
    return tuple(items) if isinstance(value, tuple) else items
