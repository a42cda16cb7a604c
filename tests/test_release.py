"""A release: one version everywhere, and a wheel that holds the package, its types and nothing else."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fxprune

ROOT = Path(__file__).parent.parent
KINDS = ["Migration", "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version() -> None:
    version = fxprune.__version__
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.M)
    citation = re.search(r'^version: "(.+)"\ndate-released: (.+)$', read("CITATION.cff"), re.M)
    assert citation is not None
    assert released[0] == (version, citation[2])
    assert citation[1] == version


def test_changelog_is_in_order() -> None:
    text = read("CHANGELOG.md")
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", text, re.M)
    assert headings[0] == ("Unreleased", "")
    dates = [date for _, date in headings[1:]]
    assert dates == sorted(dates, reverse=True)
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        kinds = re.findall(r"^### (.+)$", section, re.M)
        assert kinds == [kind for kind in KINDS if kind in kinds]
    for name, _ in headings:
        assert f"\n[{name}]: https://" in text


def test_supported_versions_are_those_of_the_project() -> None:
    project, page = read("pyproject.toml"), read("CONTRIBUTING.md")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f"| Python | {pythons[0]} | {pythons[-1]} |" in page
    assert f'requires-python = ">={pythons[0]}"' in project
    oldest = re.search(r"^\| PyTorch \| (\S+) \|", page, re.M)
    assert oldest is not None
    assert f'"torch>={oldest[1]}"' in project
    assert not re.search(r'"torch[^"]*<', project)


def test_hooks_are_local() -> None:
    text = read(".pre-commit-config.yaml")
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    checks = read(".ci/run")
    for entry in re.findall(r"entry: (.+)", text):
        assert entry in checks


def call(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    said = [str(word) for word in words]
    return subprocess.run(said, cwd=cwd, env=environment, capture_output=True, text=True)


RIGHT = """
import fxprune
from fxprune.papers import bibtex, papers_of

version: str = fxprune.__version__
entries: str = bibtex(papers_of("snip"))
names: list[str] = fxprune.list_methods()
"""
WRONG = RIGHT.replace("version: str", "version: int").replace('papers_of("snip")', "3")


@pytest.mark.slow  # a build and a fresh environment, half a minute
def test_the_wheel_installs_into_a_fresh_environment(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    pytest.importorskip("mypy")
    uv = shutil.which("uv") or pytest.skip("needs uv")
    offline = ["--offline", "--no-build-isolation", "--python", sys.executable]
    built = subprocess.run(
        [uv, "build", *offline, "-o", tmp_path / "dist"], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob(f"fxprune-{fxprune.__version__}-py3-none-any.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in inside} == {"fxprune", f"fxprune-{fxprune.__version__}.dist-info"}
    assert "fxprune/py.typed" in inside
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fxprune").rglob("*.py")}
    assert sources == {name for name in inside if name.endswith(".py")}

    fresh = tmp_path / "fresh"
    python = fresh / "bin" / "python"
    subprocess.run([uv, "venv", "-q", "--offline", "--python", sys.executable, fresh], check=True)
    subprocess.run(
        [uv, "pip", "install", "-q", "--offline", "--no-deps", "--python", python, wheel], check=True
    )
    # Types are seen from outside, first without PyTorch: no other package helps.
    for text, code in ((RIGHT, 0), (WRONG, 1)):
        (tmp_path / "outside.py").write_text(text)
        options = ("-m", "mypy", "--strict", "--python-executable", python, "outside.py")
        found = call(sys.executable, *options, cwd=tmp_path)
        assert found.returncode == code, found.stdout
    assert re.findall(r"  \[([a-z-]+)\]$", found.stdout, re.M) == ["assignment", "arg-type"]

    # The other packages are those of this environment, behind its own.
    (packages,) = (fresh / "lib").glob("*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    found = call(python, "-c", "import fxprune; print(fxprune.__version__, fxprune.__file__)", cwd=tmp_path)
    assert found.stdout.split() == [fxprune.__version__, str(packages / "fxprune" / "__init__.py")]
    words = ("prune", "zoo:conv2", "-m", "magnitude", "-s", "0.9")
    found = call(fresh / "bin" / "fxprune", *words, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "sparsity 90.00" in found.stdout
