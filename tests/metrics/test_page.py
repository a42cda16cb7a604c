"""The page of a report holds its numbers and masks, needs no network, and works in a browser."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli import run
from fxprune.metrics import Report

pytestmark = pytest.mark.filterwarnings("ignore:set_masks. 1 masks were set:UserWarning")


def report() -> Report:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 5))
    masks = {"0.weight": torch.zeros(3, 2, 3, 3, dtype=torch.bool)}
    masks["0.weight"][0] = True
    masks["0.weight"][1, 0, 0, 0] = True
    fxprune.set_masks(net, masks)
    return fxprune.analyze(net, example_inputs=torch.ones(1, 2, 4, 4))


def data_of(page: str) -> Any:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0])


def test_the_page_has_the_numbers_and_the_masks() -> None:
    found = report()
    page = found.to_html(notes=["measured: 3 ms"])
    data = data_of(page)
    assert "measured: 3 ms" in data["notes"]
    assert ["weights kept", f"{found.kept_params:,} of {found.params:,}"] in data["totals"]
    layer = data["layers"][0]
    assert (layer["name"], layer["kept"], layer["alive"], layer["grid"]) == ("0.weight", 19, 2, [3, 2])
    # Shares of nine taps, rounded up to bytes: all, all; one, none; none.
    assert list(base64.b64decode(layer["mask"])) == [255, 255, 29, 0, 0, 0]
    assert list(base64.b64decode(layer["strip"])) == [255, 255, 0]
    assert [one["density"] for one in data["layers"]] == list(found.layer_density.values())


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    page = report().to_html(path)
    assert path.read_text(encoding="utf-8") == page
    assert not re.findall(r"(?:src|href)\s*=|https?:|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_names_cannot_end_the_script_or_the_heading() -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("</script><b>", nn.Linear(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._modules["</script><b>"](x)  # type: ignore[misc,no-any-return]

    found = fxprune.analyze(Evil(), example_inputs=torch.ones(1, 2))
    assert data_of(found.to_html())["layers"][0]["name"] == "</script><b>.weight"
    assert "</script><b>" not in found._repr_html_()
    assert html.escape("</script><b>.weight") in found._repr_html_()


def test_large_masks_are_averaged() -> None:
    page = fxprune.analyze(nn.Linear(500, 300), example_inputs=torch.ones(1, 500)).to_html()
    assert data_of(page)["layers"][0]["grid"] == [96, 96]
    assert len(page) < 40_000


def test_the_command_writes_it(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "r.html"
    assert run(["analyze", "zoo:lenet_300_100", "--html", str(path)]) == 0
    assert len(data_of(path.read_text(encoding="utf-8"))["layers"]) == 3
    assert run(["analyze", "zoo:lenet_300_100", "--html", str(tmp_path / "no" / "r.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    press = """<script>addEventListener("load", () => {
        const first = document.querySelector("#layers button"); first.focus();
        first.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true})); });</script>"""
    path.write_text(report().to_html() + press, encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    found = subprocess.run(
        [*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.count('<button type="button"') == 2
    assert '<h2 id="chosen">3.weight</h2>' in found.stdout
    assert '<canvas id="mask" width="12" height="5">' in found.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_names_of_layers_are_whole_on_a_phone(tmp_path: Path) -> None:
    inner = nn.Sequential()
    inner.add_module(
        "a_block_with_a_rather_long_name_of_its_own", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    )
    page = fxprune.analyze(inner, example_inputs=torch.ones(1, 4)).to_html()
    note = """<script>addEventListener("load", () => {
        const cut = [...document.querySelectorAll(".name")].filter(one => one.scrollWidth > one.clientWidth);
        document.body.dataset.cut = cut.length; document.body.dataset.wide = innerWidth; });</script>"""
    path = tmp_path / "r.html"
    path.write_text(page + note, encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
    ]
    found = subprocess.run(
        [*command, "--window-size=500,900", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert 'data-cut="0"' in found.stdout
    assert int(re.findall(r'data-wide="(\d+)"', found.stdout)[0]) < 700
