"""The package itself: its names are there when they are asked for, and nothing slow is imported before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
