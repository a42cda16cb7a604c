"""``fxprune prune hf:FOLDER --compact``: smaller shapes in ``config.json``, where the class can have them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.cli import run

transformers = pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12) % 40
SMALL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=16, **SMALL, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=16, **SMALL)
    return transformers.GPT2LMHeadModel(config).eval()


def pruned(model: Any, sparsity: float, exclude: list[str], **options: Any) -> Any:
    """Prune in Python as the command does."""
    asked: dict[str, Any] = {"example_inputs": {"input_ids": IDS}, "returns": "module", "progress": False}
    return fxprune.apply(model, "magnitude", sparsity, exclude=exclude, **asked, **options)


def written(folder: Path, model: Any, *words: str) -> tuple[Path, int]:
    model.save_pretrained(folder / "dense")
    out = folder / "out"
    return out, run(
        ["prune", f"hf:{folder / 'dense'}", "-m", "magnitude", "--compact", *words, "--out", str(out)]
    )


CASES: dict[str, tuple[Any, list[str], dict[str, int]]] = {
    "llama": (
        llama, ["*embed*"],
        {"hidden_size": 32, "intermediate_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "llama-width": (
        llama, [],
        {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "bert": (bert, ["*embeddings*", "*attention*"], {"intermediate_size": 20, "num_attention_heads": 4}),
    "gpt2": (gpt2, ["*wte*", "*attn*"], {"n_inner": 36, "n_head": 4, "n_embd": 16}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-width", "bert", "gpt2"))],
)
def test_a_compact_folder_is_read_and_computes_what_the_masked_model_does(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, exclude, sizes = CASES[case]
    model = make()
    words = [word for pattern in exclude for word in ("--exclude", pattern)]
    options = ["--granularity", "head", "--scope", "uniform", "--round-to", "4", "-s", "0.4", *words]
    out, code = written(tmp_path, model, *options)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "dense shapes" not in said.out
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] for name in sizes} == sizes
    again = type(model).from_pretrained(out).eval()
    assert sum(p.numel() for p in again.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    masked = pruned(model, 0.4, exclude, granularity="head", scope="uniform", round_to=4)
    assert torch.allclose(again(input_ids=IDS).logits, masked(input_ids=IDS).logits, atol=1e-5)
    assert transformers.AutoModel.from_pretrained(out).config.to_dict() == again.config.to_dict()
    if case != "bert":
        asked: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        tokens = again.generate(IDS, **asked)
        assert torch.equal(tokens, masked.generate(IDS, **asked))


@pytest.mark.slow
def test_tied_heads_stay_tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(tie_word_embeddings=True)
    options = ["--granularity", "head", "--scope", "uniform", "--round-to", "4", "-s", "0.4"]
    out, code = written(tmp_path, model, *options)
    assert code == 0, capsys.readouterr().err
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    assert again.config.hidden_size == 24
    assert again.lm_head.weight is again.model.embed_tokens.weight
    masked = pruned(model, 0.4, [], granularity="head", scope="uniform", round_to=4)
    assert torch.allclose(again(input_ids=IDS).logits, masked(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words", "why"),
    [
        (
            llama,
            ["--granularity", "head", "--exclude", "*embed*"],
            "layers end with different sizes: 'model.lay",
        ),
        (llama, ["--granularity", "head", "--scope", "uniform", "--round-to", "5"], "is refused ("),
        (
            bert,
            ["--granularity", "head", "--scope", "uniform"],
            "BertForMaskedLM has no 'narrowed_bert_embed",
        ),
        (
            bert,
            ["--granularity", "head", "--scope", "uniform", "--exclude", "*embeddings*"],
            "no sizes in BertConfig make 'bert.encoder.layer.0.attention.self.query.weight' (",
        ),
    ],
)
def test_the_folder_is_dense_with_zeros_where_the_class_has_no_such_sizes(
    make: Any, words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make()
    out, code = written(tmp_path, model, "-s", "0.4", *words)
    said = capsys.readouterr()
    assert code == 0, said.err
    line = next(line for line in said.out.splitlines() if "dense shapes with zeros, for" in line)
    assert why in line
    again = type(model).from_pretrained(out)
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert any(int((p == 0).sum()) > p.numel() // 4 for p in again.parameters() if p.dim() > 1)


def test_weights_that_leave_every_channel_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for granularity in ("weight", "2:4"):
        _, code = written(tmp_path, llama(), "--granularity", granularity)
        assert code == 2
        assert f"--compact: --granularity {granularity} leaves every channel" in capsys.readouterr().err
