"""Exported networks: they run where they are deployed, at any batch size, and give the same numbers."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS
from torch import Tensor, nn

import fxprune
import fxprune.rewrite.files.export as module

has_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not has_onnx, reason="onnx, onnxscript or onnxruntime is not installed")


def compacted(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, inputs = NETS[kind]()
    model.eval()
    masked = fxprune.apply(
        model, "magnitude", 0.3, granularity="channel", example_inputs=inputs, progress=False
    )
    return fxprune.compact(masked), inputs


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("residual", "vit")), "two_inputs"]
)
def test_onnx_runs_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    small, inputs = compacted(kind)
    fxprune.export(small, tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == ["net.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    for batch in (1, 5):
        given = [torch.randn(batch, *x.shape[1:]) for x in inputs]
        names = [place.name for place in session.get_inputs()]
        found = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
        with torch.no_grad():
            expected = small(*given)
        expected = expected if isinstance(expected, (tuple, list)) else [expected]
        for a, b in zip(expected, found, strict=True):
            assert np.allclose(a.numpy(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["residual", "vit", "dict_input"])
def test_pt2(kind: str, tmp_path: Path) -> None:
    small, inputs = compacted(kind)
    fxprune.export(small, tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == ["net.pt2"]
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    given = inputs if isinstance(inputs, dict) else {"input": inputs}
    names = [str(node.target) for node in small.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, given.values(), strict=True))
    wider = {name: torch.cat([x, x, x[:1]]) for name, x in given.items()}
    with torch.no_grad():
        assert torch.allclose(small(**wider), loaded(*wider.values()), atol=1e-5)


class Keywords(nn.Module):
    """A network with two inputs, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x if y is None else x + y) * scale
        return out


@pytest.mark.parametrize("captured", [False, True])
def test_keyword_arguments(captured: bool, tmp_path: Path) -> None:
    given = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}
    net = fxprune.capture(Keywords(), given) if captured else Keywords()
    fxprune.export(net, tmp_path / "net.pt2", given)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    wider = {name: torch.randn(5, 4) for name in given}
    found = loaded(wider["x"], 1.0, wider["y"]) if captured else loaded(**wider)
    assert torch.allclose(net(**wider), found, atol=1e-5)


def test_masks_are_baked_in_and_the_model_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = NETS["standard"]()
    masked = fxprune.apply(
        model, "magnitude", 0.5, example_inputs=inputs, progress=False, returns="module"
    ).train()
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    fxprune.export(masked, tmp_path / "net.pt2", inputs)
    assert masked.training
    assert all(torch.equal(before[name], value) for name, value in masked.state_dict().items())
    program = torch.export.load(tmp_path / "net.pt2")
    assert not any("mask" in name for name in program.state_dict)
    with torch.no_grad():
        assert torch.allclose(masked.eval()(inputs), program.module()(inputs), atol=1e-5)


class Checked(nn.Module):
    """A network that refuses inputs by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not (x > -50).all():
            raise ValueError("too small")
        out: Tensor = self.layer(x)
        return out


def test_checks_of_numbers_are_in_the_program(tmp_path: Path) -> None:
    net = fxprune.capture(Checked(), torch.ones(2, 4))
    code = net.code
    fxprune.export(net, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.randn(3, 4)
    assert torch.allclose(program(x), net(x))
    with pytest.raises(RuntimeError, match="raises ValueError"):
        program(x - 100)
    assert net.code == code


class Batched(nn.Module):
    """A network that reads its batch size as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.reshape(2, 4))
        return out


def test_a_batch_size_that_is_fixed_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the batch size is fixed at 2 in net\.pt2"):
        fxprune.export(Batched(), tmp_path / "net.pt2", torch.ones(2, 4))


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"path='net\.bin': expected a name that ends in \.onnx or \.pt2"):
        fxprune.export(net, "net.bin", torch.ones(1, 4))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        fxprune.export(3, "net.pt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example_inputs: the input size of Linear is not known"):
        fxprune.export(net, tmp_path / "net.pt2")
    with pytest.raises(
        ValueError, match=r"example_inputs: Linear does not accept \(\[2, 5\],\): .*; pass inputs"
    ):
        fxprune.export(net, tmp_path / "net.pt2", torch.ones(1, 5))
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/net\.pt2: there is no folder .*nowhere; make it first$"
    ):
        fxprune.export(net, tmp_path / "nowhere" / "net.pt2", torch.ones(1, 4))
    real = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == "onnxscript" else real(n))
    if importlib.util.find_spec("onnx"):
        words = (
            r"export to \.onnx needs the package 'onnxscript'.*pip install onnxscript, or 'fxprune\[onnx\]'"
        )
        with pytest.raises(ModuleNotFoundError, match=words):
            fxprune.export(net, tmp_path / "net.onnx", torch.ones(1, 4))
    assert os.listdir(tmp_path) == []


def test_outputs_that_differ_are_an_error_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "difference", lambda a, b: 0.5)
    with pytest.raises(RuntimeError, match=r"the outputs of net\.pt2 differ by 5\.0e-01 of the largest"):
        fxprune.export(nn.Linear(4, 2), tmp_path / "net.pt2", torch.ones(1, 4))
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # as on a full disk, a write fails
    try:
        with pytest.raises(OSError, match=r"net\.pt2: not written \(File too large\)"):
            fxprune.export(nn.Linear(40, 20), tmp_path / "net.pt2", torch.ones(1, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
