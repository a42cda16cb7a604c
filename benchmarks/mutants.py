"""Change the package in one place at a time and see whether a test fails: a sample of mutants, by a seed.

    python benchmarks/mutants.py map tests/paths tests/graph   # note which test runs which lines (appends)
    python benchmarks/mutants.py run 300 0                     # 300 mutants by seed 0; goes on where it ended
    python benchmarks/mutants.py judge 17 equivalent "why"     # what was found out about a survivor by hand
    python benchmarks/mutants.py judge 18 killed "added: tests/paths/test_scaled.py::test_zeros"
    python benchmarks/mutants.py table                         # writes docs/mutants.md

A mutant lives in memory: an import hook compiles the changed syntax tree in a forked process, and the files
stay as they are. Of the tests that run the changed line the quickest come first. Results name the commit that
the sample was drawn at; after larger changes of the package, draw another with another seed.
"""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
ROOMS = ("graph", "lowering", "paths", "channels", "sparsity", "rewrite")
MAP, RESULTS, PAGE = HERE / ".mutants_map.jsonl", HERE / "mutants.jsonl", ROOT / "docs" / "mutants.md"
TRACED, BUDGET, TIMEOUT = 2.0, 12.0, 400.0
"""CPU seconds of a test in which lines are noted, of the tests of a mutant; seconds until one is ended."""

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Messages, types, and what only a type checker reads.
SKIPPED = (ast.Raise, ast.Assert, ast.AnnAssign, ast.JoinedStr, ast.Import, ast.ImportFrom)


Site = tuple[int, ast.AST, str, "int | None", ast.AST]
"""A change: line, parent, the parent's field, the index in that, and the new node."""


def changes(node: ast.AST) -> list[ast.AST]:
    """Return what may stand in place of ``node``."""
    if type(node) in SWAPS:
        return [SWAPS[type(node)]()]
    match node:
        case ast.Constant(value=bool(value)):
            return [ast.Constant(not value)]
        case ast.Constant(value=int(value)) | ast.Constant(value=float(value)):
            return [ast.Constant(value + 1), ast.Constant(value - 1)]
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            return [ast.Name(NAMES[name], ast.Load())]
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return [operand]
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            return [ast.Return(ast.Constant(None))]
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            return [ast.Pass()]
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            return [ast.Pass()]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not _compares(test):
            return [type(node)(**{**dict(ast.iter_fields(node)), "test": ast.UnaryOp(ast.Not(), test)})]
    return []


def _compares(test: ast.AST) -> bool:
    return isinstance(test, ast.Compare)


def sites(tree: ast.AST, line: int = 1) -> list[Site]:
    """List every change of a tree, always in the same order."""
    found: list[Site] = []
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            # Without it ``zip`` does the same wherever the lengths agree.
            strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if not isinstance(child, ast.AST) or typing or strict:
                continue
            at = getattr(child, "lineno", line)
            found += [(at, tree, name, index, new) for new in changes(child)]
            if not isinstance(child, SKIPPED):
                found += sites(child, at)
    return found


def put(site: Site) -> tuple[str, str]:
    """Make a change in its tree; return the text of the expression around it, before and after."""
    _, parent, name, index, new = site
    around = parent if isinstance(parent, ast.expr) else None
    old = getattr(parent, name) if index is None else getattr(parent, name)[index]
    before = ast.unparse(around or old)
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new
    ast.copy_location(new, old)
    return before.split("\n")[0], ast.unparse(around or new).split("\n")[0]


class Mutated(SourceFileLoader):
    """Load one module with one change in it."""

    site = 0

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(Path(self.path).read_text(encoding="utf-8"))
        put(sites(tree)[self.site])
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class Finder:
    """Find that module before anybody else does."""

    def __init__(self, path: str, site: int) -> None:
        self.path, self.site = path, site

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        spec = PathFinder.find_spec(name, path, target) if name.startswith("fxprune") else None
        if spec is None or spec.origin != self.path:
            return None
        spec.loader = Mutated(name, self.path)
        spec.loader.site = self.site
        return spec


class Lines:
    """A pytest plugin: note which lines of the rooms each test runs, and its CPU time."""

    def __init__(self) -> None:
        self.prefix = str(ROOT / "fxprune") + os.sep
        self.wanted = {file for room in ROOMS for file in map(str, (ROOT / "fxprune" / room).rglob("*.py"))}
        self.seen: set[tuple[str, int]] = set()
        self.end = 0.0

    def call(self, frame: FrameType, event: str, _: object) -> Any:
        if time.process_time() > self.end:
            sys.settrace(None)
            return None
        return self.line if frame.f_code.co_filename in self.wanted else None

    def line(self, frame: FrameType, event: str, _: object) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.seen.clear()
        start = time.process_time()
        self.end = start + TRACED
        sys.settrace(self.call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            lines: dict[str, list[int]] = {}
            for file, number in sorted(self.seen):
                lines.setdefault(file[len(str(ROOT)) + 1 :], []).append(number)
            note = {"test": item.nodeid, "cpu": round(time.process_time() - start, 3), "lines": lines}
            with MAP.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")


class Chosen:
    """A pytest plugin: run these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def sample(count: int, seed: int) -> list[tuple[str, int]]:
    """Draw the mutants: file and number of the change in it."""
    everything = [
        (str(path.relative_to(ROOT)), number)
        for room in ROOMS
        for path in sorted((ROOT / "fxprune" / room).rglob("*.py"))
        for number in range(len(sites(ast.parse(path.read_text(encoding="utf-8")))))
    ]
    return random.Random(seed).sample(everything, count)


def tests_for(file: str, line: int, notes: list[dict[str, Any]]) -> list[str]:
    """List the tests that run the line, the quickest first; of a line that import runs, those of its file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    is_inside = any(node.body[0].lineno <= line <= (node.end_lineno or 0) for node in functions)
    users = [note for note in notes if file in note["lines"]]
    users = [note for note in users if not is_inside or line in note["lines"][file]]
    chosen, total = [], 0.0
    for note in sorted(users, key=lambda note: float(note["cpu"])):
        total += note["cpu"]
        if total > BUDGET and chosen:
            break
        chosen.append(note["test"])
    return chosen


def verdict(file: str, site: int, tests: list[str]) -> tuple[str, str]:
    """Run the tests with the change in a forked process: "killed" and the test, "timeout" or "survived"."""
    log = MAP.with_suffix(".log")
    child = os.fork()
    if child == 0:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.meta_path.insert(0, Finder(str(ROOT / file), site))
        files = sorted({test.split("::")[0] for test in tests})
        options = "-n 0 -x -q -p no:cacheprovider --tb=no -rfE".split()
        os._exit(pytest.main([*options, "-m", "slow or not slow", *files], plugins=[Chosen(tests)]))
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            text = log.read_text(encoding="utf-8", errors="replace")
            words = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return ("survived", "") if status == 0 else ("killed", words[0][:200] if words else "no import")
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed", "time ran out"


def run(count: int = 300, seed: int = 0) -> None:
    """Try the mutants that have no result yet."""
    for module in ("torch", "torchvision", "timm", "hypothesis", "networkx", "torch._dynamo"):
        __import__(module)
    notes, done = read(MAP), {entry["mutant"] for entry in read(RESULTS)}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    for mutant, (file, number) in enumerate(sample(count, seed)):
        if mutant in done:
            continue
        site = sites(ast.parse((ROOT / file).read_text(encoding="utf-8")))[number]
        before, after = put(site)
        tests = tests_for(file, site[0], notes)
        result, by = (
            verdict(file, number, tests) if tests else ("survived", "no test in the map runs the line")
        )
        entry = {"mutant": mutant, "file": file, "line": site[0], "before": before, "after": after,
                 "verdict": result, "by": by, "tests": len(tests), "commit": commit}  # fmt: skip
        print(json.dumps(entry), flush=True)
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(json.dumps(entry) + "\n")


def judge(mutant: str, result: str, why: str) -> None:
    """Note what was found out about a survivor by hand; the last line about a mutant counts."""
    entry = {entry["mutant"]: entry for entry in read(RESULTS)}[int(mutant)]
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(json.dumps({**entry, "verdict": result, "by": why}) + "\n")


def table() -> None:
    """Write the page: numbers by room, and every mutant that is equivalent or survived."""
    entries = list({entry["mutant"]: entry for entry in read(RESULTS)}.values())
    numbers = Counter((entry["file"].split("/")[1], entry["verdict"]) for entry in entries)
    verdicts = ("killed", "equivalent", "survived")
    rows = [f"| {room} | " + " | ".join(str(numbers[room, one]) for one in verdicts) + " |" for room in ROOMS]
    whole = [str(sum(numbers[room, one] for room in ROOMS)) for one in verdicts]
    commits = ", ".join(sorted({entry["commit"] for entry in entries}))
    page = [
        "# Mutants\n",
        "`benchmarks/mutants.py` changes one place at a time and runs the tests that run the line.",
        f"{len(entries)} mutants, drawn by seed at {commits}. The map of tests to lines is not of the whole",
        "suite, and a mutant gets the quickest tests that run its line, for some seconds. What those did not",
        "kill was made once more by hand, in the code of the day, and judged with the test that is named.\n",
        "| room | killed | equivalent | survived |",
        "|---|---|---|---|",
        *rows,
        f"| all | {' | '.join(whole)} |\n",
    ]
    chosen = {
        "Equivalent": [entry for entry in entries if entry["verdict"] == "equivalent"],
        "Killed by a test that was added": [entry for entry in entries if entry["by"].startswith("added: ")],
        "Survived": [entry for entry in entries if entry["verdict"] == "survived"],
    }
    for title, some in chosen.items():
        page += [f"## {title}\n"] if some else []
        for entry in some:
            change = f"`{entry['before']}` -> `{entry['after']}`"
            page.append(f"* `{entry['file']}:{entry['line']}` {change}: {entry['by'] or 'no test fails'}")
        page += [""] if some else []
    PAGE.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    word, *rest = sys.argv[1:] or ["run"]
    if word == "map":
        sys.exit(pytest.main(["-n", "0", "-q", "-p", "no:cacheprovider", *rest], plugins=[Lines()]))
    elif word == "run":
        run(*map(int, rest))
    else:
        {"judge": judge, "table": table}[word](*rest)
