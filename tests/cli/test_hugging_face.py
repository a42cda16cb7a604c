"""``fxprune prune hf:FOLDER``: folders of transformers in, and out again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.cli import run
from fxprune.cli.hugging_face import load_calibration, load_folder, token_loss

transformers = pytest.importorskip("transformers")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "and", "dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a tied head, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=True, bos_token_id=2,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(path)
    return path


def text(path: Path, repeats: int = 60) -> Path:
    path.write_text("the cat sat on a mat and the dog sat on the cat " * repeats)
    return path


@pytest.mark.slow
def test_a_folder_is_pruned_on_text_and_written_back(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["-m", "sparsegpt", "-s", "0.5", "--batches", "5", "--data", str(text(tmp_path / "some.txt"))]
    assert run(["prune", f"hf:{folder}", *words, "--out", str(out)]) == 0, capsys.readouterr().err
    assert json.loads((out / "report.json").read_text())["method"] == "sparsegpt"
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        weight = again.get_parameter(f"model.layers.1.{name}.weight")
        assert int((weight != 0).sum()) == weight.numel() // 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert again.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3).shape == (1, 5)


@pytest.mark.slow
def test_methods_with_a_loss_take_that_of_the_next_token(folder: Path, tmp_path: Path) -> None:
    model, _ = load_folder(f"hf:{folder}")
    batches = load_calibration(text(tmp_path / "some.txt"), f"hf:{folder}", model)
    inputs, tokens = batches[0]
    with torch.no_grad():
        found = token_loss(model)(model(**inputs), tokens)
        wanted = torch.nn.functional.cross_entropy(
            model(**inputs).logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )
    assert torch.allclose(found, wanted, atol=1e-6)
    words = ["-m", "taylor", "-s", "0.3", "--granularity", "head", "--scope", "uniform", "--batches", "2"]
    words += [
        "--exclude",
        "*embed*",
        "--exclude",
        "*self_attn*",
        "--data",
        str(tmp_path / "some.txt"),
        "--compact",
    ]
    assert run(["prune", f"hf:{folder}", *words, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] < 24


def test_data_without_a_loss_are_told_of(folder: Path) -> None:
    model, inputs = load_folder(f"hf:{folder}")
    with pytest.raises(ValueError, match=r"--data: it gives no loss for LlamaForCausalLM.*such as wanda"):
        token_loss(model)(model(**inputs), torch.zeros(1))


def test_weights_that_are_cut_off(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:2000])
    assert run(["prune", f"hf:{tmp_path}", "-m", "magnitude"]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "its weights cannot be read" in printed
    assert "save the model anew" in printed


@pytest.mark.slow
def test_arrays_are_calibration_data_too(folder: Path, tmp_path: Path, capsys: Any) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 13, (16, 8)))
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(0, 13, (16, 8)))
    for name in ("ids.npy", "ids.npz"):
        words = ["-m", "wanda", "-s", "0.5", "--data", str(tmp_path / name)]
        assert run(["prune", f"hf:{folder}", *words]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_what_is_wrong_is_said_in_a_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    little, much = text(tmp_path / "little.txt", 0), text(tmp_path / "much.txt")
    np.save(tmp_path / "far.npy", np.full((2, 8), 99))
    cases: list[tuple[str, list[str], str]] = [
        (f"hf:{empty}", [], "has no config.json; expected a folder of transformers"),
        (f"hf:{tmp_path}/none", [], "has no config.json"),
        (f"hf:{bare}", ["--data", str(much)], "has no tokenizer for text"),
        (f"hf:{folder}", ["--data", str(little)], "0 tokens, and a row has 8; give more text"),
        (f"hf:{folder}", ["--data", str(tmp_path / "x.txt")], "there is no such file"),
        (f"hf:{folder}", ["--data", str(empty)], "there is no such file"),
        (f"hf:{folder}", ["--data", str(folder / "config.json")], "expected .txt, .npy or .npz"),
        (f"hf:{folder}", ["--compact"], "--compact: --granularity weight leaves every channel"),
        (f"hf:{folder}", ["--data", str(tmp_path / "far.npy")], "tokens of data run from 99 to 99"),
        (f"hf:{folder}", [], "method 'sparsegpt' needs --data"),
    ]
    (empty / "note.txt").write_text("")
    for source, more, message in cases:
        assert run(["prune", source, "-m", "sparsegpt", *more]) == 2
        assert message in capsys.readouterr().err
    (bare / "model.safetensors").unlink()
    assert run(["prune", f"hf:{bare}"]) == 2
    assert "has no weights" in capsys.readouterr().err


def test_zeros_that_are_kept_are_told_of(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    # Its table has a row of zeros, for padding, and is the last layer as well.
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "dense")
    out = str(tmp_path / "out")
    assert run(["prune", f"hf:{tmp_path / 'dense'}", "-m", "random", "-s", "0.5", "--out", out]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "zero themselves" in line)
    assert run(["analyze", f"hf:{out}"]) == 0
    read = next(line for line in capsys.readouterr().out.splitlines() if "sparsity" in line)
    assert line.split()[-1] == read.split()[-1] != "50.0000%"
