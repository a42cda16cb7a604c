"""Files of whole networks: what is loaded into a fresh original computes what was saved, to the bit."""

import copy
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS
from safetensors.torch import load_file, save_file
from thinning import one_in
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.rewrite.files import container

FEW_CHANNELS = {"across", "layer_scale", "multiplier", "tied"}
"""Nets that keep all channels at the sparsity of these tests."""


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(inputs, dict):
            result = model(**inputs)
        else:
            result = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def made(kind: str, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model, inputs = NETS[kind]()
    return model.eval(), inputs


def pruned(model: nn.Module, inputs: Any, sparsity: float, **options: Any) -> nn.Module:
    return fxprune.apply(model, "magnitude", sparsity, example_inputs=inputs, progress=False, **options)


def assert_equal(saved: nn.Module, loaded: nn.Module, inputs: Any) -> None:
    left, right = run(saved, inputs), run(loaded, inputs)
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    states = saved.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("kind", "returns"), one_in(2, sorted(NETS), ["graph", "module"]))
@pytest.mark.filterwarnings("ignore:layer collapse")
def test_masked_networks(kind: str, returns: str, tmp_path: Path) -> None:
    model, inputs = made(kind, 0)
    masked = pruned(model, inputs, 0.6, returns=returns).eval()
    fxprune.save(masked, tmp_path / "file")
    again = fxprune.load(tmp_path / "file", made(kind, 1)[0])
    assert type(again) is type(masked) or returns == "graph"
    assert_equal(masked, again, inputs)
    fxprune.verify(again)
    masks = fxprune.load_masks(tmp_path / "file")
    assert all(torch.equal(mask, masks[name]) for name, mask in fxprune.masks(masked).items())


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("kind", "returns"), one_in(2, sorted(NETS.keys() - FEW_CHANNELS), ["graph", "module"])
)
def test_compact_networks(kind: str, returns: str, tmp_path: Path) -> None:
    model, inputs = made(kind, 0)
    small = fxprune.compact(pruned(model, inputs, 0.3, granularity="channel", returns=returns), inputs)
    fxprune.save(small, tmp_path / "file")
    fresh = made(kind, 1)[0]
    before = copy.deepcopy(fresh.state_dict())
    assert_equal(small, fxprune.load(tmp_path / "file", fresh), inputs)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", ["residual", "vit", "norms", "grouped", "window", "standard"])
def test_networks_compacted_twice_and_pruned_again(kind: str, tmp_path: Path) -> None:
    model, inputs = made(kind, 0)
    small = fxprune.compact(pruned(model, inputs, 0.3, granularity="channel"))
    smaller = fxprune.compact(pruned(copy.deepcopy(small), None, 0.2, granularity="channel"))
    assert len(smaller.meta["fxprune"]["recipes"]) == 2
    fxprune.save(smaller, tmp_path / "file")
    again = fxprune.load(tmp_path / "file", made(kind, 1)[0])
    assert_equal(smaller, again, inputs)
    masked = pruned(pickle.loads(pickle.dumps(again)), None, 0.3).eval()
    fxprune.save(masked, tmp_path / "masked")
    assert_equal(masked, fxprune.load(tmp_path / "masked", made(kind, 2)[0]), inputs)


def test_what_training_changed_is_in_the_file(tmp_path: Path) -> None:
    model, inputs = made("residual", 0)
    small = fxprune.compact(pruned(model, inputs, 0.3, granularity="channel")).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        small(torch.randn_like(inputs)).square().mean().backward()
        optimizer.step()
    small.eval()
    fxprune.save(small, tmp_path / "file")
    assert_equal(small, fxprune.load(tmp_path / "file", made("residual", 1)[0]), inputs)
    by_name = load_file(tmp_path / "file")
    names = dict(model.named_parameters())
    assert by_name.keys() <= model.state_dict().keys()
    assert all(by_name[name].shape == p.shape for name, p in small.named_parameters() if name in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = made("residual", 0)
    small = fxprune.compact(pruned(model, inputs, 0.3, granularity="channel")).to(dtype)
    fxprune.save(small, tmp_path / "file", form="sparse")
    again = fxprune.load(tmp_path / "file", made("residual", 1)[0])
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert_equal(small, again, inputs.to(dtype))


def test_an_original_without_values_will_do(tmp_path: Path) -> None:
    model, inputs = made("conv_chain", 0)
    small = fxprune.compact(pruned(model, inputs, 0.3, granularity="channel"))
    fxprune.save(small, tmp_path / "file")
    with torch.device("meta"):
        hollow = NETS["conv_chain"]()[0].eval()
    assert_equal(small, fxprune.load(tmp_path / "file", hollow), inputs)


class Tied(nn.Module):
    """One matrix as an embedding and as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(300, 64), nn.Linear(64, 300, bias=False)
        self.last.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.embed(x))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("returns", ["graph", "module"])
def test_a_sparse_file_has_bits_and_kept_values_and_tied_weights_once(
    dtype: torch.dtype, returns: str, tmp_path: Path
) -> None:
    x = torch.arange(8)
    masked = pruned(Tied(), x, 0.9, returns=returns).to(dtype)
    dense = sum(p.numel() * p.element_size() for p in masked.parameters())
    fxprune.save(masked, tmp_path / "file", form="sparse")
    size = (tmp_path / "file").stat().st_size
    assert size < dense * (0.1 + 1 / 8 / dtype.itemsize) + 2500
    again = fxprune.load(tmp_path / "file", Tied())
    assert again.get_parameter("embed.weight") is again.get_parameter("last.weight")
    assert_equal(masked, again, x)
    fxprune.save(masked, tmp_path / "dense", form="dense")
    assert dense < (tmp_path / "dense").stat().st_size < dense * (1 + 1 / 8 / dtype.itemsize) + 2500
    assert_equal(masked, fxprune.load(tmp_path / "dense", Tied()), x)


def test_zeros_without_masks_are_stored_as_bits_and_signs_of_zero_stay(tmp_path: Path) -> None:
    model, inputs = made("mlp", 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.2)  # leaves zeros of both signs
    fxprune.save(model, tmp_path / "file", form="sparse")
    again = fxprune.load(tmp_path / "file", made("mlp", 1)[0])
    assert_equal(model, again, inputs)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.signbit(), again.get_parameter(name).signbit())


def test_finalized_networks(tmp_path: Path) -> None:
    model, inputs = made("residual", 0)
    final = fxprune.finalize(pruned(model, inputs, 0.5)).eval()
    fxprune.save(final, tmp_path / "file", form="sparse")
    assert_equal(final, fxprune.load(tmp_path / "file", made("residual", 1)[0]), inputs)
    model, inputs = made("standard", 0)
    for returns in ("graph", "module"):
        baked = fxprune.finalize(pruned(model, inputs, 0.5, returns=returns))
        with pytest.raises(ValueError, match="save the masked network"):
            fxprune.save(baked, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def conv_net(width: int = 8, stride: int = 1, kind: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride, padding=1), nn.BatchNorm2d(width), kind(),
        nn.Conv2d(width, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def small_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    masked = pruned(conv_net(), torch.randn(2, 3, 8, 8), 0.4, granularity="channel")
    fxprune.save(fxprune.compact(masked), tmp_path / "file")
    return tmp_path / "file"


def test_wrong_originals(tmp_path: Path) -> None:
    path = small_file(tmp_path)

    def refused(model: Any, words: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=words):
            fxprune.load(path, model, **options)

    refused(conv_net(9), r"model: the parameter '0\.weight' has shape \(9, 3, 3, 3\), in .* \(8, 3, 3, 3\)")
    refused(conv_net()[:-1], r"model: it has no parameter '6\.weight'")
    refused(nn.Sequential(*conv_net(), nn.Linear(5, 5)), r"model: it has a parameter '7\.weight'")
    refused(conv_net(stride=2), "first at node _0")
    refused(conv_net(kind=nn.GELU), "first at node _2")
    refused(3, "model: expected a torch.nn.Module", TypeError)
    masked = pruned(conv_net(), torch.randn(2, 3, 8, 8), 0.4, returns="module")
    fxprune.save(masked, path)
    other = conv_net()
    other[0] = type("Own", (nn.Conv2d,), {})(3, 8, 3, padding=1)  # type: ignore[operator]
    refused(other, "'0' is a Own, in the saved network a Conv2d")
    fxprune.save(masked, path, form="masks")
    refused(conv_net(), r"masks without weights; use fxprune\.set_masks")
    fxprune.save(masked, path, form="ticket")
    refused(conv_net(), r"a ticket, without weights; use fxprune\.load_ticket")


def test_damaged_foreign_and_truncated_files(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    whole = path.read_bytes()
    model = conv_net()

    def refused(data: bytes, words: str) -> None:
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            fxprune.load(tmp_path / "bad", model)
        assert str(tmp_path / "bad") in str(caught.value)
        assert "\n" not in str(caught.value)

    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        refused(whole[:end], "not a readable network file")
    for at in range(9, len(whole), 61):  # one bit, anywhere in the header or the tensors
        refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "damaged|not a|format|another form")
    save_file({"weight": torch.zeros(3)}, tmp_path / "plain")
    refused((tmp_path / "plain").read_bytes(), "not an fxprune network file")
    with pytest.raises(FileNotFoundError, match="no such network file"):
        fxprune.load(tmp_path / "absent", model)


def edited(path: Path, change: Any) -> None:
    """Rewrite a file's manifest, checksum and all, as somebody might who means harm."""
    header, tensors = container.read_container(path, "network")
    manifest = json.loads(header["manifest"])
    change(manifest)
    container.write_container(tensors, path, {**header, "manifest": json.dumps(manifest)})


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("kind"),
        lambda m: m.update(recipes=[{}]),
        lambda m: m["layout"]["0.weight"].update(shape=[1]),
        lambda m: m["layout"].update({"more": {"shape": [1]}}),
        lambda m: m["recipes"][0]["kept"]["0.weight"]["axes"].__setitem__(0, "0-99"),
        lambda m: m["recipes"][0]["sizes"].setdefault("0", {}).update(forward=3),
        lambda m: m["recipes"][0]["edits"].append(
            {
                "node": "x",
                "op": "call_function",
                "target": "os.system",
                "args": [],
                "kwargs": {},
                "before": "_0",
            }
        ),
        lambda m: m["recipes"][0]["edits"].append(
            {"node": "x", "op": "call_method", "target": "tofile", "args": [], "kwargs": {}, "before": "_0"}
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change: Any, tmp_path: Path) -> None:
    path = small_file(tmp_path)
    edited(path, change)
    with pytest.raises(ValueError, match=r"damaged network file|cannot be cut|another one"):
        fxprune.load(path, conv_net())


class Turned(nn.Module):
    """Has a complex number in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second((y[:, :, None] * (1 + 2j)).abs().reshape(y.shape[0], 12))
        return out


@pytest.mark.slow
def test_complex_numbers_in_code_are_written_and_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(3, 4)
    small = fxprune.compact(pruned(model, x, 0.5, granularity="channel"), x).eval()
    assert len(small.get_parameter("first.weight")) < 12
    fxprune.save(small, tmp_path / "file")
    assert_equal(small, fxprune.load(tmp_path / "file", Turned()).eval(), x)


def test_arguments_of_save(tmp_path: Path) -> None:
    model = conv_net()
    fxprune.save(tmp_path / "file", model)  # type: ignore[arg-type]  # in the order of load, too
    assert_equal(model.eval(), fxprune.load(tmp_path / "file", conv_net()).eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match="form='small': expected one of 'dense', 'sparse', 'masks', 'ticket'"
    ):
        fxprune.save(model, tmp_path / "x", form="small")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"network: expected a torch\.nn\.Module, got a dict"):
        fxprune.save({}, tmp_path / "x")  # type: ignore[arg-type]
    with torch.device("meta"):
        hollow = conv_net()
    with pytest.raises(ValueError, match=r"'0\.weight' is split over processes or has no values"):
        fxprune.save(hollow, tmp_path / "x")
    assert os.listdir(tmp_path) == ["file"]


def test_modes_are_those_of_the_original(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    model = conv_net()
    model[1].eval()
    again = fxprune.load(path, model)
    assert again.training
    assert not again.get_submodule("1").training


def test_the_share_of_a_sparse_file() -> None:
    assert math.isclose(0.1 + 1 / 32, 0.13, abs_tol=0.002)


INTERRUPTED = """
import signal, sys, torch, fxprune
from torch import nn
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
model = nn.Linear(3000, 3000)
print("ready", flush=True)
while True:
    fxprune.save(model, sys.argv[1])
"""


@pytest.mark.slow
def test_an_interrupt_leaves_a_whole_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    while not file.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert os.listdir(tmp_path) == ["file"]
    fxprune.load(file, nn.Linear(3000, 3000))


class Variational(nn.Module):
    """Draws in training alone, which its graph runs as a branch of that mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mean, self.spread = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        latent, spread = self.mean(hidden), self.spread(hidden)
        if self.training:
            latent = latent + torch.randn_like(latent) * spread.exp()
        return self.out(latent)


def test_a_compact_network_with_code_of_one_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Variational().eval(), torch.randn(2, 6)
    small = fxprune.compact(pruned(net, x, 0.3, granularity="channel"))
    fxprune.save(small, tmp_path / "net.safetensors")
    again = fxprune.load(tmp_path / "net.safetensors", Variational().eval())
    assert_equal(small, again, x)
    torch.manual_seed(1)
    expected = small.train()(x)
    torch.manual_seed(1)
    assert torch.equal(again.train()(x), expected)
