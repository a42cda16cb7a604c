"""Names of PyTorch that are not public: each is what it is taken for, and no other file uses one."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fxprune
from fxprune import torch_private as private

PACKAGE = Path(fxprune.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "torch_private.py"]


class Calls(TorchFunctionMode):
    """Record what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_classes_of_layers() -> None:
    assert issubclass(nn.BatchNorm2d, private.BatchNorm)
    assert issubclass(private.BatchNorm, private.NormBase)
    assert issubclass(nn.InstanceNorm2d, private.NormBase)
    assert not issubclass(nn.InstanceNorm2d, private.BatchNorm)
    assert not issubclass(nn.LayerNorm, private.NormBase)
    assert all(issubclass(kind, private.ConvNd) for kind in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d))
    assert issubclass(nn.ConvTranspose1d, private.ConvTransposeNd)
    assert not issubclass(nn.Conv1d, private.ConvTransposeNd)
    assert all(issubclass(kind, private.DropoutNd) for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout))


def test_a_context_without_gradients_calls_a_function() -> None:
    with Calls() as calls, torch.no_grad():
        pass
    assert calls.seen.count(private.set_grad_mode) == 2


def test_autocast_is_entered_and_left() -> None:
    context = private.enter_autocast("cpu", torch.bfloat16, True, None)
    inside = torch.is_autocast_enabled("cpu")
    private.exit_autocast(context)
    assert inside
    assert not torch.is_autocast_enabled("cpu")


def test_unique_entries_with_their_places_and_numbers() -> None:
    found = private.unique2(torch.tensor([3, 1, 3]), True, True, True)
    assert [part.tolist() for part in found] == [[1, 3], [1, 0, 1], [1, 2]]


def test_functions_are_not_seen_where_that_is_off() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise ArithmeticError

    loud = torch.ones(2).as_subclass(Loud)
    with pytest.raises(ArithmeticError):
        torch.add(loud, loud)
    with private.DisableTorchFunction():
        assert torch.add(loud, loud).tolist() == [2, 2]


def test_a_dispatch_mode_sees_operators() -> None:
    class Seen(private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Seen():
        torch.ones(2).relu()
    assert torch.ops.aten.relu.default in seen
    assert all(isinstance(func, private.OpOverload) for func in seen)
    assert isinstance(torch.ops.aten.relu, private.OpOverloadPacket)


def test_trees() -> None:
    tree = {"a": [torch.ones(1), 2], "b": (torch.zeros(1),)}
    assert len(private.pytree.tree_leaves(tree)) == 3
    assert private.pytree.tree_map(type, tree)["a"] == [torch.Tensor, int]
    assert private.pytree.tree_map_only(int, lambda number: number + 1, tree)["a"][1] == 3
    leaves, spec = private.pytree.tree_flatten(tree)
    assert private.pytree.tree_unflatten(leaves, spec)["a"][1] == 2


def test_names_and_lists_of_functions() -> None:
    assert private.qualified_name(torch.add) == "torch.add"
    assert {torch.ones, torch.arange, torch.zeros} <= set(private.device_constructors())
    assert nn.functional.gelu is private.nn_functions.gelu
    assert callable(private.nn_functions.glu)
    parsed = private.nn_functions._parse_to(torch.ones(1, dtype=torch.float64), True)
    assert parsed == (torch.device("cpu"), torch.float64, True, None)
    private.check_number(True, "fine")
    with pytest.raises(AssertionError, match="not so"):
        private.check_number(False, "not so")
    private.check_entry(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not so"):
        private.check_entry(torch.tensor(False), "not so")


def test_hooks_of_all_modules_are_kept_there() -> None:
    before = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    after = nn.modules.module.register_module_forward_hook(
        lambda *_: None, with_kwargs=True, always_call=True
    )
    try:
        assert before.id in private.global_forward_pre_hooks
        assert after.id in private.global_forward_hooks
        assert after.id in private.global_hooks_with_kwargs
        assert after.id in private.global_hooks_always_called
    finally:
        before.remove()
        after.remove()
        private.global_hooks_with_kwargs.pop(after.id, None)  # which PyTorch leaves there
        private.global_hooks_always_called.pop(after.id, None)
    assert not private.global_forward_hooks


def test_a_fused_step_is_adam() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5).requires_grad_()
    weight.grad = torch.randn(5)
    scores, zeros = weight.detach().clone(), [torch.zeros(5) for _ in range(2)]
    torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-6).step()
    private.fused_adam_(
        [scores], [weight.grad], [zeros[0]], [zeros[1]], [], [torch.ones(())],
        lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-6, amsgrad=False, maximize=False,
    )  # fmt: skip
    assert torch.allclose(scores, weight, atol=1e-6)


def hidden(name: str) -> bool:
    return any(atom.startswith("_") and not atom.startswith("__") for atom in name.split(".")[1:])


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names below torch with an underscore that a file imports, or reaches from what it imports."""
    roots = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    roots[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            for alias in node.names:
                roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in roots and rest.replace(".", "").isidentifier() and "aten." not in rest:
                yield f"{roots[first]}.{rest}"


def test_no_other_file_uses_one() -> None:
    found = {path.relative_to(PACKAGE): private_names(ast.parse(path.read_text("utf-8"))) for path in FILES}
    assert [(path, name) for path, names in found.items() for name in names if hidden(name)] == []


def test_private_names_are_found() -> None:
    imports = "import torch\nfrom torch.utils import _pytree\nfrom torch import nn\n"
    text = imports + "torch._C.x; nn.m._B; torch.ops.aten._c"
    found = {name for name in private_names(ast.parse(text)) if hidden(name)}
    assert found == {"torch.utils._pytree", "torch._C.x", "torch._C", "torch.nn.m._B"}


def test_checks_of_distributions_and_packed_sequences_call_functions() -> None:
    x, lengths = torch.randn(2, 3, 4), torch.tensor([3, 2])
    with Calls() as calls:
        torch.distributions.Normal(x, x.exp(), validate_args=True)  # torch.compile turns it off
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    assert {private.all_true, private.pack_padded_sequence, private.pad_packed_sequence} <= set(calls.seen)
    assert bool(private.any_true(torch.tensor([False, True])))


def test_transforms_open_levels_and_wrap_tensors() -> None:
    levels, wrapped = [], []

    def noting(kind: list[str], name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            kind.append(name)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind, places in ((levels, private.transform_levels), (wrapped, private.transform_wrappers)):
            for home, name in places:
                patch.setattr(home, name, noting(kind, name, getattr(home, name)))
        x = torch.ones(3)
        torch.func.vmap(torch.func.grad(torch.sin))(x)
        torch.func.jvp(torch.sin, (x,), (x,))
    assert set(levels) == {name for _, name in private.transform_levels}
    assert set(wrapped) == {name for _, name in private.transform_wrappers}


def test_layers_of_torch_read_their_state_as_modules_do_unless_they_say_otherwise() -> None:
    assert nn.Linear._load_from_state_dict is private.load_module_state
    assert nn.BatchNorm2d._load_from_state_dict is not private.load_module_state
