"""The house rules of the package, read off its source: who may import whom, and where.

The ladder: { capture | graph } <- lowering <- paths <- channels <- sparsity <- scoring <- { methods | rewrite
| metrics } <- latency <- api <- training <- sweeps <- cli. A room may import the rooms left of it; rooms in
braces never import each other.
"""

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fxprune"
RANKS = {
    "finite": -0.5, "arguments": -1, "keywords": -1, "option_notes": -1, "papers": -1, "sharded_types": -1,
    "torch_private": -1, "tensor_files": -1, "whole_files": -1,
    "capture": 0, "graph": 0, "progress": 0, "data": 0, "zoo": 0, "plot": 0, "lowering": 1, "paths": 2,
    "channels": 3, "sparsity": 4, "scoring": 5, "methods": 6, "rewrite": 6, "metrics": 6, "request": 7,
    "latency": 7, "network": 8, "sharding": 8, "timed": 8.5, "plans": 6.5, "search": 8.7, "api": 9,
    "grouping": 9, "reconstruction": 9, "evaluation": 9,
    "whole_models": 8.5, "planning": 9.5, "training": 10,
    "sweeps": 11, "__init__": 12, "cli": 13, "__main__": 14,
}  # fmt: skip
OPTIONAL = {
    "matplotlib", "sklearn", "transformers", "lightning", "scipy", "onnx", "onnxruntime", "openvino",
    "tomllib", "tomli", "accelerate", "fastai", "huggingface_hub",
}  # fmt: skip
# Packages that are slow to import -> the rooms that are only imported when they are needed anyway.
SLOW: dict[str, set[str]] = {
    "networkx": set(), "rich": {"cli"}, "timm": set(), "torch.distributed.fsdp": set(),
    "torch.distributed.tensor": set(), "torchvision": set(), "typer": {"cli"},
}  # fmt: skip
# The command line shows its help with these, without PyTorch; where they need it, they may import it and the
# modules of the package that do.
LIGHT = {
    "fxprune",
    "fxprune.__main__",
    *(
        f"fxprune.cli{name}"
        for name in (
            "", ".channel_flags", ".config", ".data_sources", ".flags", ".hugging_face", ".methods",
            ".planning", ".pruning", ".reports", ".sources", ".sweeping", ".train", ".wording",
        )
    ),
}  # fmt: skip
HEAVY = ("torch", "safetensors.torch", "numpy")
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}

DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "normal", "random", "shuffle"}

OPENINGS = ("What", "Where", "Which", "How", "Whatever")
"""Words that no docstring opens with: its first line is an action with its object, or what is true."""

FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = PACKAGE.parent
FOLDERS = ("tests", "benchmarks", "examples", "docs")
OTHERS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = ("fxprune", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    """The part of the package that a module belongs to: ``"methods"``, ``"api"``, ..."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement with the module, or the module and name, that it asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def internal(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a file imports."""
    for _, name in imports(tree):
        if name.split(".")[0] == "fxprune":
            while name not in MODULES:
                name = name.rpartition(".")[0]
            yield name


def type_checking_blocks(tree: ast.Module) -> list[ast.If]:
    """The conditions ``if TYPE_CHECKING:`` at the top level."""
    return [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]


def slow(name: str) -> str | None:
    """The slow package that an import of ``name`` brings in."""
    return next((package for package in SLOW if f"{name}.".startswith(f"{package}.")), None)


@functools.cache
def parse(path: Path) -> ast.Module:
    """Parse a file, once for all rules: a tree is only read."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def findings(rule: Callable[[Path], Iterator[str]], files: Sequence[Path] = FILES) -> list[str]:
    """All that a rule finds in files, each with the file's name before it."""
    return [f"{path.relative_to(ROOT)}{found}" for path in files for found in rule(path)]


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 10
    assert {"fxprune.sparsity.select", "fxprune.methods", "fxprune"} <= set(MODULES)


def test_imports_go_down_the_ladder() -> None:
    def rule(path: Path) -> Iterator[str]:
        own = room(module_name(path))
        if own not in RANKS:
            yield f": {own} has no place in the ladder"
            return
        for name in internal(parse(path)):
            other = room(name)
            if not (other == own or RANKS[other] < RANKS[own]):
                yield f" imports {name}: {own} may not import {other}"

    assert findings(rule) == []


def test_there_are_no_cycles() -> None:
    graph = {name: set(internal(parse(path))) - {name} for name, path in MODULES.items()}
    # Importing a module runs its packages too; only a package that imports its own files counts here.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_imports_stand_at_the_top() -> None:
    def rule(path: Path) -> Iterator[str]:
        tree = parse(path)
        at_top = {id(node) for node in tree.body}
        for_types = {id(node) for block in type_checking_blocks(tree) for node in block.body}
        light = module_name(path) in LIGHT
        for node, name in imports(tree):
            later = light and name.startswith((*HEAVY, "fxprune."))
            allowed = name.split(".")[0] in OPTIONAL or slow(name) is not None or later
            if id(node) not in at_top | for_types and not allowed:
                yield f":{node.lineno} imports {name} inside a function or a condition"

    assert findings(rule) == []


def test_slow_packages_are_imported_where_they_are_used() -> None:
    def rule(path: Path) -> Iterator[str]:
        tree = parse(path)
        at_top = {id(node) for node in tree.body}
        for node, name in imports(tree):
            package = slow(name)
            if package is not None and id(node) in at_top and room(module_name(path)) not in SLOW[package]:
                yield f":{node.lineno} imports {package} with the module; import it in the function"

    assert findings(rule) == []


def test_help_is_shown_without_torch() -> None:
    """No module that the command line imports for help imports PyTorch, nor do those below it."""
    waiting, seen = sorted(LIGHT), set(LIGHT)
    while waiting:
        tree = parse(MODULES[(module := waiting.pop())])
        top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        for _, name in imports(top):
            assert not name.startswith(HEAVY), f"{module} imports {name}"
        waiting += set(internal(top)) - seen
        seen |= set(internal(top))
    assert "fxprune.option_notes" in seen


def test_imports_are_absolute_and_by_name() -> None:
    def rule(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    yield f":{node.lineno} is a relative import"
                if any(alias.name == "*" for alias in node.names):
                    yield f":{node.lineno} is a star import"

    assert findings(rule) == []


def test_files_have_names_that_say_something() -> None:
    assert [str(path) for path in FILES if path.stem.strip("_") in VAGUE] == []


def test_files_and_functions_stay_readable() -> None:
    def rule(path: Path) -> Iterator[str]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 400:
            yield f" has {lines} lines"
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    yield f": {node.name} has {length} lines"

    assert findings(rule) == []


def test_nothing_is_swallowed_or_left_open() -> None:
    def rule(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                if caught in ("everything", "Exception", "BaseException"):
                    yield f":{node.lineno} catches {caught}"
            if isinstance(node, ast.Raise) and node.exc and "NotImplemented" in ast.unparse(node.exc):
                yield f":{node.lineno} is left open"
        text = path.read_text(encoding="utf-8")
        yield from (f" contains {word}" for word in ("TO" + "DO", "FIX" + "ME") if word in text)

    assert findings(rule) == []


def documented(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every module, class and function that has a docstring, by name, with its first line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "the module"), text.splitlines()[0]


def private_imports(tree: ast.AST, own: str) -> Iterator[tuple[int, str]]:
    """Names with an underscore that are imported from another room of the package than ``own``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("fxprune."):
            for alias in node.names:
                path = [*str(node.module).split("."), alias.name]
                hidden = [atom for atom in path if atom.startswith("_") and not atom.startswith("__")]
                if hidden and room(str(node.module)) != own:
                    yield node.lineno, ".".join(path)


def test_docstrings_open_with_an_action() -> None:
    def rule(path: Path) -> Iterator[str]:
        for name, line in documented(parse(path)):
            if line.split()[0].rstrip(",:") in OPENINGS:
                yield f": {name} opens with {line!r}"

    assert findings(rule, [*FILES, *OTHERS]) == []


def test_private_names_stay_in_their_room() -> None:
    """Tests, benchmarks and examples have no room of the package: they import no private name."""

    def rule(path: Path) -> Iterator[str]:
        own = room(module_name(path)) if path in FILES else ""
        yield from (f":{line} imports {name}" for line, name in private_imports(parse(path), own))

    assert findings(rule, [*FILES, *OTHERS]) == []


def drawn_at_import(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls outside of functions that draw random numbers without a generator: no test has seeded those."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [*node.decorator_list, *node.args.defaults]
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, ast.Call) and not any(word.arg == "generator" for word in node.keywords):
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in DRAWS:
                    yield node.lineno, name
            waiting += ast.iter_child_nodes(node)


def test_no_numbers_are_drawn_when_a_file_of_tests_is_imported() -> None:
    def rule(path: Path) -> Iterator[str]:
        yield from (f":{line} calls {name}" for line, name in drawn_at_import(parse(path)))

    assert findings(rule, sorted((ROOT / "tests").rglob("*.py"))) == []
    one = ast.parse("x = torch.randn(3)\ny = torch.rand(3, generator=g)\ndef f():\n    return torch.rand(3)")
    assert list(drawn_at_import(one)) == [(1, "randn")]


def test_the_rules_about_words_and_names_find_what_they_forbid() -> None:
    tree = ast.parse(
        'def f():\n    """What it does."""\n'
        "from fxprune.graph.ops import _refusal, Op\nfrom fxprune._core import x"
    )
    assert [line.split()[0] for _, line in documented(tree)] == ["What"]
    assert [name for _, name in private_imports(tree, "")] == [
        "fxprune.graph.ops._refusal",
        "fxprune._core.x",
    ]
    assert [name for _, name in private_imports(tree, "graph")] == ["fxprune._core.x"]
