"""Tests stand where their module stands, under its name; what a room's front tests is listed here.

A module with more than 60 lines of code has a file of tests of its name, in the folder of its room: that of
``fxprune/paths/count.py`` is ``tests/paths/test_count.py``. Modules at the top of the package have theirs in
``tests`` or in ``tests/api``. A module that is reached through the front of its room alone is in ``FRONTS``,
with the file whose tests run it.
"""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "fxprune"
LARGE = 60
"""Lines of code, without comments, docstrings and imports."""

FRONTS = {
    "api.py": "api/test_apply.py",
    "capture/entry.py": "capture/test_graph.py",
    "capture/errors.py": "capture/test_inputs.py",
    "capture/fidelity/compare.py": "capture/test_in_use.py",
    "capture/fidelity/guards.py": "capture/test_in_use.py",
    "capture/fidelity/other_inputs.py": "capture/test_graph.py",
    "capture/fidelity/search.py": "capture/test_leaves.py",
    "capture/modes.py": "capture/fidelity/test_merge.py",
    "capture/tracer/call_targets.py": "capture/test_leaves.py",
    "capture/tracer/hook_calls.py": "capture/test_hooks.py",
    "capture/tracer/module_calls.py": "capture/test_leaves.py",
    "capture/tracer/overloads.py": "capture/test_transforms.py",
    "capture/tracer/questions.py": "capture/test_checks.py",
    "capture/tracer/reachable.py": "capture/tracer/test_isolation.py",
    "capture/tracer/recorder.py": "capture/test_graph.py",
    "capture/tracer/snapshots.py": "capture/tracer/test_isolation.py",
    "capture/tracer/spelling.py": "capture/test_module.py",
    "capture/tracer/tape.py": "capture/test_graph.py",
    "capture/tracer/transforms.py": "capture/test_transforms.py",
    "capture/tracer/trace.py": "capture/test_graph.py",
    "capture/tracer/values.py": "capture/tracer/test_traced_numbers.py",
    "cli/flags.py": "cli/test_cli.py",
    "cli/reports.py": "cli/test_cli.py",
    "cli/train.py": "cli/test_experiment.py",
    "cli/training_run.py": "cli/test_experiment.py",
    "graph/ops.py": "graph/test_verify.py",
    "latency/results.py": "latency/test_bench.py",
    "lowering/builder.py": "lowering/test_lower.py",
    "lowering/eager.py": "api/test_shares.py",
    "lowering/results.py": "lowering/rules/test_modes.py",
    "methods/balance/tap_placement.py": "methods/balance/test_balance.py",
    "methods/dpai/outer_factors.py": "methods/dpai/test_kernel_gradients.py",
    "methods/dpai/weight_gradients.py": "methods/dpai/test_objective.py",
    "methods/phew/transitions.py": "methods/phew/test_walks.py",
    "network.py": "api/test_shares.py",
    "paths/circuit/builder.py": "paths/circuit/test_circuit.py",
    "paths/program.py": "paths/test_count.py",
    "paths/steps.py": "paths/test_count.py",
    "paths/traversal.py": "paths/test_count.py",
    "paths/windows.py": "paths/test_count.py",
    "plans.py": "api/test_planning.py",
    "request.py": "api/test_arguments.py",
    "rewrite/compact/cut.py": "rewrite/compact/test_compaction.py",
    "rewrite/compact/giving_back.py": "rewrite/compact/test_closed.py",
    "rewrite/compact/norm_nodes.py": "rewrite/compact/test_norms.py",
    "rewrite/compact/plain_values.py": "rewrite/files/test_network.py",
    "rewrite/compact/recipe.py": "rewrite/files/test_network.py",
    "rewrite/compact/replay.py": "rewrite/files/test_network.py",
    "rewrite/compact/statistics.py": "rewrite/compact/test_means.py",
    "rewrite/compact/table.py": "rewrite/compact/test_compaction.py",
    "rewrite/files/state.py": "rewrite/files/test_network.py",
    "rewrite/masking/parameters.py": "rewrite/masking/test_refusals.py",
    "scoring/forms.py": "api/test_arguments.py",
    "scoring/layer_plan.py": "methods/test_sparsegpt.py",
    "scoring/moments.py": "scoring/test_walk.py",
    "scoring/shapes.py": "api/test_arguments.py",
    "scoring/surgeon.py": "methods/test_sparsegpt.py",
    "search.py": "api/test_limits.py",
    "sparsity/sharded.py": "scoring/test_distributed.py",
    "sweeps/grid.py": "sweeps/test_sweep.py",
    "timed.py": "latency/test_target.py",
    "training/saving.py": "training/test_checkpoints.py",
}


def lines_of_code(text: str) -> int:
    """Count the lines that are no comment, docstring, import or blank."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    numbered = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in skipped
        for number, line in numbered
    )


def own_tests(module: Path) -> list[Path]:
    """The files of tests of the name of a module, in the folder of its room."""
    name = f"test_{module.stem}.py"
    homes = [module.parent] if module.parent != Path() else [Path(), Path("api")]
    return [path for path in (TESTS / home / name for home in homes) if path.exists()]


MODULES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.stem[:2] != "__"]


def test_large_modules_have_tests_of_their_name_or_a_front() -> None:
    own = {module.as_posix() for module in MODULES if own_tests(module)}
    large = {
        module.as_posix()
        for module in MODULES
        if lines_of_code((PACKAGE / module).read_text(encoding="utf-8")) > LARGE
    }
    assert sorted(large - own - FRONTS.keys()) == [], "add tests of their names, or put them in FRONTS"
    assert sorted(own & FRONTS.keys()) == [], "these have tests of their own: take them out of FRONTS"


def test_fronts_and_their_modules_are_there() -> None:
    assert [name for name in FRONTS if not (PACKAGE / name).exists()] == []
    assert [name for name in FRONTS.values() if not (TESTS / name).exists()] == []


def test_lines_of_code_are_counted() -> None:
    text = '"""A docstring."""\nimport torch\n\n# why\nx = 1\n\ndef f():\n    """Do it."""\n    return x\n'
    assert lines_of_code(text) == 3
