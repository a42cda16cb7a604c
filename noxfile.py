"""Run the tests over the oldest and the newest versions that are supported: ``uv run --group all nox``.

``nox -s lowest -- tests/graph`` runs a part. ``nox -s smoke`` runs on the oldest Python what ``.ci/run`` runs
on the oldest PyTorch.
"""

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lowest", "newest"]

LOWEST = "torch==2.9.*"
# Editable: uv keeps the wheel that it once built of a folder, whatever changes in it.
EXTRAS = ("-e", ".[test,plot,onnx,lightning,transformers]")


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Run the suite on the oldest Python and PyTorch."""
    session.install(LOWEST, *EXTRAS)
    session.run("pytest", *(session.posargs or ("-m", "not zoo")))


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Run the suite on the newest Python and PyTorch."""
    session.install("--upgrade", *EXTRAS)
    session.run("pytest", *(session.posargs or ("-m", "not zoo")))


@nox.session(python="3.10")
def smoke(session: nox.Session) -> None:
    """Run a few files of tests on the oldest Python and PyTorch."""
    session.install(LOWEST, "-e", ".[test]")
    session.run("pytest", "@.ci/smoke.txt")
