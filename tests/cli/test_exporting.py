"""The command ``export``: folders and files of prune, and models, are written for other runtimes."""

from pathlib import Path

import pytest
import torch

import fxprune
from fxprune.cli import run


@pytest.mark.slow
def test_a_folder_and_a_file_of_prune_are_exported(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, written = tmp_path / "out", tmp_path / "small.pt2"
    channels = ["--granularity", "channel", "-s", "0.5", "--compact"]
    assert run(["prune", f"{file}:small", "-m", "magnitude", *channels, "--out", str(out)]) == 0
    dense = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    masked = fxprune.finalize(fxprune.load(out / "model.safetensors", dense))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    counts = {}
    for form, words, said in (
        ("folder", [str(out)], "compact"),
        ("compact file", [str(out / "compact.safetensors")], "compact"),
        ("masked", [str(out), "--form", "masked"], "masked: dense shapes, with zeros"),
        ("file", [str(out / "model.safetensors")], "masked: dense shapes, with zeros"),
    ):
        capsys.readouterr()
        assert run(["export", *words, str(written)]) == 0
        assert capsys.readouterr().out.endswith(f", {written} ({said})\n")
        program = torch.export.load(written)
        assert torch.allclose(program.module()(x), masked(x), atol=1e-6)
        counts[form] = sum(parameter.numel() for parameter in program.parameters())
    assert (
        counts["folder"]
        == counts["compact file"]
        < counts["masked"]
        == counts["file"]
        == 16 * 6 + 16 + 4 * 16 + 4
    )


def test_a_form_that_is_not_there_is_named(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run(["prune", f"{file}:small", "-m", "magnitude", "-s", "0.5", "--out", out]) == 0
    capsys.readouterr()
    assert run(["export", out, str(tmp_path / "net.pt2"), "--form", "compact"]) == 2
    assert f"--form compact: in {out} there is masked, dense" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_exported_to_several_files(file: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.pt2", tmp_path / "b.pt2"]
    assert run(["export", f"{file}:small", *map(str, files)]) == 0
    assert all(path.stat().st_size for path in files)
