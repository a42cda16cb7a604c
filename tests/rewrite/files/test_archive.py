"""Mask files: one bit per weight, a header that says where they come from, errors that name the file."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.fx import symbolic_trace

from fxprune.rewrite import load_masks, read, read_header, save, set_masks, stamp
from fxprune.rewrite.files import container
from rewrite import nets


@pytest.fixture
def gm():
    graph = symbolic_trace(nets.small_cnn())
    set_masks(graph, nets.masks_for(graph, density=0.1))
    return graph


def test_round_trip(gm, tmp_path):
    file = tmp_path / "masks.safetensors"
    save(gm, file, form="masks")
    loaded = load_masks(str(file))
    assert loaded.keys() == read(gm).keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in read(gm).items())
    other = nets.small_cnn()
    set_masks(other, loaded)
    assert all(torch.equal(loaded[name], mask) for name, mask in read(other).items())
    header = read_header(file)
    weights = sum(mask.numel() for mask in loaded.values())
    alive = sum(int(mask.sum()) for mask in loaded.values())
    assert header["format"] == "fxprune"
    assert header["format_version"] == "1"
    assert header["method"] == header["seed"] == "unknown"
    assert float(header["sparsity"]) == 1 - alive / weights
    assert (header["kept"], header["total"]) == (str(alive), str(weights))
    assert header["torch"] == torch.__version__
    assert json.loads(header["shapes"])["0.weight"] == [6, 3, 3, 3]


def test_a_file_is_there_in_full_or_as_it_was(gm, tmp_path, monkeypatch):
    file = tmp_path / "masks.safetensors"
    save(gm, file)
    before = file.read_bytes()

    def fails(tensors, path, metadata):
        open(path, "wb").write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(container, "save_tensors", fails)
    with pytest.raises(OSError, match=r"masks\.safetensors: not written \(no space left\)"):
        save(gm, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_bit_for_a_weight(tmp_path):
    model = nn.Linear(256, 1024)
    set_masks(model, nets.masks_for(model))
    save(model, tmp_path / "file", form="masks")
    assert (tmp_path / "file").stat().st_size < 256 * 1024 / 8 + 1000


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17])
def test_odd_sizes(size, tmp_path):
    model = nn.Linear(size, 1)
    set_masks(model, nets.masks_for(model, density=0.6, seed=size))
    save(model, tmp_path / "file", form="masks")
    assert torch.equal(load_masks(tmp_path / "file")["weight"], model.weight_mask)


def test_where_masks_come_from_survives_copies(gm, tmp_path):
    stamp(gm, method="synflow", sparsity=0.9, seed=3)
    for twin in (
        gm,
        copy.deepcopy(gm),
        pickle.loads(pickle.dumps(gm)),
        pickle.loads(pickle.dumps(copy.deepcopy(gm))),
    ):
        save(twin, tmp_path / "file")
        header = read_header(tmp_path / "file")
        assert (header["method"], header["sparsity"], header["seed"]) == ("synflow", "0.9", "3")
    save(gm, tmp_path / "file", method="other")
    assert read_header(tmp_path / "file")["method"] == "other"
    assert read_header(tmp_path / "file")["seed"] == "3"


def test_files_that_are_not_ours(gm, tmp_path):
    def refused(path, *words):
        with pytest.raises(ValueError, match="mask") as caught:
            load_masks(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        assert all(word in message for word in words), message

    text = tmp_path / "text"
    text.write_text("no tensors here")
    refused(text, "not a readable mask file")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", "not an fxprune mask file")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "pickle")
    refused(tmp_path / "pickle", "a file of torch.save", "torch.load")
    good = tmp_path / "good"
    save(gm, good, form="masks")
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-3])
    refused(tmp_path / "cut")
    save_file({"w": torch.zeros(3)}, tmp_path / "newer", {"format": "fxprune", "format_version": "3"})
    refused(tmp_path / "newer", "format '3'")
    head = {"format": "fxprune", "format_version": "1"}
    for shapes, tensor in (
        ('{"w": [30]}', torch.zeros(3, dtype=torch.uint8)),
        ('{"w": [24]}', torch.zeros(3)),
        ('{"v": [24]}', torch.zeros(3, dtype=torch.uint8)),
        ('{"w": [20]}', torch.full((3,), 255, dtype=torch.uint8)),
        ("nothing", torch.zeros(3, dtype=torch.uint8)),
        ("[1]", torch.zeros(3, dtype=torch.uint8)),
    ):
        save_file({"w": tensor}, tmp_path / "bad", {**head, "shapes": shapes})
        refused(tmp_path / "bad", "damaged")
    save_file({"w": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "bad", head)
    refused(tmp_path / "bad", "damaged")
    with pytest.raises(IsADirectoryError, match="this is a folder; expected a mask file in it"):
        load_masks(tmp_path)
    with pytest.raises(IsADirectoryError, match="this is a folder; expected the name of a file"):
        save(gm, tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_masks(tmp_path / "absent")
    with pytest.raises(ValueError, match="no masks"):
        save(nn.Linear(2, 2), tmp_path / "none", form="masks")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["fomr", "from_", "forms"])
def test_a_misspelt_form_is_no_fact(gm, tmp_path, name):
    with pytest.raises(TypeError, match=f"^save has no argument '{name}'; did you mean 'form'\\?$"):
        save(gm, tmp_path / "a", **{name: "dense"})
    assert not list(tmp_path.iterdir())
