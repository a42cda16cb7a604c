"""The package itself: its names are there when they are asked for, and nothing slow is imported before."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.api import apply

SLOW = {
    "networkx", "rich", "sympy", "timm", "torch.distributed.fsdp", "torch.distributed.tensor", "torchvision"
}  # fmt: skip


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after ``code``."""
    script = f"import contextlib, io, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
    found = subprocess.run(
        [sys.executable, "-c", script + "print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(found.stdout.split())


def test_every_name_is_found_and_listed() -> None:
    assert fxprune.__all__ == sorted(fxprune.__all__)
    for name in fxprune.__all__:
        assert callable(getattr(fxprune, name))
    assert set(fxprune.__all__) <= set(dir(fxprune))
    assert fxprune.apply is apply
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = fxprune.aply  # type: ignore[attr-defined]


NET = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "Pruner": ((NET, "gmp", 0.5), {"total": 3}),
    "analyze": ((NET,), {}),
    "apply": ((NET,), {}),
    "bench": (({"net": NET},), {}),
    "capture": ((NET,), {}),
    "channel_groups": ((NET,), {}),
    "compact": ((NET,), {}),
    "evaluate": ((NET, torch.ones(2, 4)), {}),
    "export": ((NET, "net.pt2"), {}),
    "finalize": ((NET,), {}),
    "list_methods": ((), {}),
    "load": (("net.safetensors", NET), {}),
    "load_masks": (("net.safetensors",), {}),
    "load_ticket": (("net.safetensors", NET), {}),
    "lottery": ((lambda: NET, lambda model: 0.0, 2), {}),
    "lower": ((NET,), {}),
    "masks": ((NET,), {}),
    "plan": ((NET,), {}),
    "plot_history": ((NET,), {}),
    "recalibrate": ((NET, torch.ones(2, 4)), {}),
    "reconstruct": ((NET, torch.ones(2, 4), NET), {}),
    "regularizer": (("greg", NET), {}),
    "remap_optimizer": ((torch.optim.SGD(NET.parameters()), NET, NET), {}),
    "set_masks": ((NET, {}), {}),
    "sweep": ((lambda: NET, ["magnitude"], [0.5]), {"folder": "results"}),
    "verify": ((NET,), {}),
}
"""Each public function but ``save``, to whose header any other argument goes -> a call of it."""


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_that_a_function_lacks_is_explained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args, kwargs = CALLS[name]
    with pytest.raises(
        TypeError, match=r"has no (argument|option) 'colour'.*; (its|it takes|expected)"
    ) as found:
        getattr(fxprune, name)(*args, **kwargs, colour=torch.ones(2, 4))
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_every_function_is_called_above() -> None:
    assert set(fxprune.__all__) - set(CALLS) == {"Method", "Plan", "save"}


@pytest.mark.parametrize("name", ["load", "load_masks", "load_ticket"])
@pytest.mark.parametrize("path", [None, 3, NET])
def test_a_path_that_is_none_is_named(name: str, path: Any) -> None:
    with pytest.raises(TypeError, match=r"^path: got a \w+, expected the name of a file, as in"):
        getattr(fxprune, name)(path, *CALLS[name][0][1:])


@pytest.mark.parametrize("name", ["masks", "set_masks", "load_ticket", "regularizer"])
def test_a_model_that_is_none_is_named(name: str) -> None:
    args = [torch.nn.Linear if one is NET else one for one in CALLS[name][0]]
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got the class Linear; call"):
        getattr(fxprune, name)(*args)


def test_names_for_type_checkers_are_those_of_the_package() -> None:
    tree = ast.parse(Path(fxprune.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == fxprune._HOMES
    assert sorted(homes) == fxprune.__all__


@pytest.mark.slow
def test_the_room_capture_does_not_hide_the_function() -> None:
    code = "import fxprune; from fxprune.capture import capture; assert fxprune.capture is capture"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_rooms_are_attributes() -> None:
    code = "import fxprune; fxprune.rewrite.read, fxprune.methods.names, fxprune.zoo.resnet20"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_package_imports_nothing_slow() -> None:
    found = imported_by("import fxprune; [getattr(fxprune, name) for name in fxprune.__all__]")
    assert "torch" in found
    assert not found.intersection(SLOW)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--help",
        "methods",
        "methods --json",
        "no-such-command",
        "prune --help",
        "analyze --help",
        "graph -h",
        "train --help",
        "prune --method snip --help",
        "--version",
        "prune",
    ],
)
def test_help_needs_no_torch(words: str) -> None:
    found = imported_by(f"from fxprune.cli import run; run({words.split()})")
    assert "torch" not in found
    assert "rich" not in found or words not in ("", "--help", "--version", "methods", "methods --json")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("analyse", "analyze"), ("compat", "compact"), ("prune", "apply"), ("trainin", "training")],
)
def test_a_misspelt_name_names_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; did you mean '{meant}'"):
        getattr(fxprune, name)
    assert not hasattr(fxprune, "_analyse")
