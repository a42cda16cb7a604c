"""Run the tests over the oldest and the newest versions that are supported: ``uv run --group all nox``.

``nox -s lowest -- tests/graph`` runs a part. ``nox -s smoke`` is what ``.ci/run`` runs on the oldest PyTorch, on the
oldest Python too.
"""

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lowest", "newest"]

LOWEST = "torch==2.9.*"
EXTRAS = ".[test,plot,onnx,lightning,transformers]"
SMOKE = (
    "tests/test_torch_private.py",
    "tests/api/test_apply.py",
    "tests/capture/test_graph.py",
    "tests/capture/test_recompute.py",
    "tests/graph/test_golden.py",
    "tests/rewrite/files/test_export.py",
    "tests/rewrite/masking/test_masked_module.py",
)
"""Files of tests that use most of what differs between releases of PyTorch; ``.ci/run`` names the same."""


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Run the suite on the oldest Python and PyTorch."""
    session.install(LOWEST, EXTRAS)
    session.run("pytest", *(session.posargs or ("-m", "not zoo")))


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Run the suite on the newest Python and PyTorch."""
    session.install("--upgrade", EXTRAS)
    session.run("pytest", *(session.posargs or ("-m", "not zoo")))


@nox.session(python="3.10")
def smoke(session: nox.Session) -> None:
    """Run a few files of tests on the oldest Python and PyTorch."""
    session.install(LOWEST, ".[test]")
    session.run("pytest", *SMOKE)
